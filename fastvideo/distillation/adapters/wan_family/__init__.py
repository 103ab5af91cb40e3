"""All that Wan checkpoints can do beside text to video: images, two experts, streams, flow maps."""
