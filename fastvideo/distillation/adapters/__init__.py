"""Model families. One file each; a family never sees an algorithm or an optimizer."""
