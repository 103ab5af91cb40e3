"""The command `python -m tools.tiny_world`; see :mod:`tools.tiny_world.build`."""

from __future__ import annotations

from tools.tiny_world.build import main

if __name__ == "__main__":
    main()
