"""``python -m fastvideo.cli`` is ``fastvideo``."""

from fastvideo.cli import main

raise SystemExit(main())
