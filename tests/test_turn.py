"""Laws of the turn: interrupts wait, destructors never do, threads take turns."""

from __future__ import annotations

import signal
import threading

import pytest

from vattn.allocator.turn import Turn


def test_an_interrupt_waits_for_the_end_of_the_outermost_turn() -> None:
    turn, steps = Turn(), []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117  the law is about nesting
        with turn:
            with turn:
                signal.raise_signal(signal.SIGINT)
                steps.append("inner")
            steps.append("outer")
    assert steps == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_does_not_hide_an_error() -> None:
    turn = Turn()
    with pytest.raises(KeyboardInterrupt) as caught, turn:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise ValueError("first")
    assert isinstance(caught.value.__context__, ValueError)


def test_what_a_destructor_leaves_is_done_at_the_end() -> None:
    turn, done = Turn(), []
    turn.soon(lambda: done.append("at once"))
    with turn:
        turn.soon(lambda: done.append("later"))
        with turn:
            pass
        assert done == ["at once"]
    assert done == ["at once", "later"]


def test_destructors_of_other_threads_do_not_wait() -> None:
    turn, done = Turn(), []
    with turn:
        thread = threading.Thread(target=turn.soon, args=(lambda: done.append(1),))
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive()
        assert not done
    assert done == [1]


def test_one_thread_at_a_time() -> None:
    turn, count = Turn(), [0]

    def add() -> None:
        for _ in range(300):
            with turn:
                seen = count[0]
                turn.soon(lambda: None)
                count[0] = seen + 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == [1200]
