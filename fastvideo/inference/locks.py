"""Locks of objects that threads share: a network answers one call at a time."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

_locks: WeakKeyDictionary[object, threading.RLock] = WeakKeyDictionary()
_making = threading.Lock()


def lock_of(shared: object) -> threading.RLock:
    """The lock of a network or a conditioner, one for as long as it lives.

    A causal call changes its network for a moment (``view.seeing``), and a text encoder's cache is no safer.
    """
    with _making:
        return _locks.setdefault(shared, threading.RLock())
