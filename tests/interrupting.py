"""Ends a command in the middle: a crash, or a request to stop, at a call."""

import os
import signal


class Crash(BaseException):
    """What no handler of a command catches, as little as a kill."""


def at_call(monkeypatch, owner, name, n, act):
    """Has something happen at the n-th call of a function, once."""
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(args)
        if len(calls) == n:
            monkeypatch.setattr(owner, name, original)
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


def crash():
    raise Crash


def stop():
    """As a job scheduler asks for it."""
    os.kill(os.getpid(), signal.SIGTERM)


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
