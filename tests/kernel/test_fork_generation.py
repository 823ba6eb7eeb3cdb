"""A process knows how far it is from its ancestors by fork, and how often it has forked."""

from __future__ import annotations

import threading

from forked import in_child
from vmm_linux._core import kernel


def both() -> list[int]:
    return [kernel.fork_generation(), kernel.fork_children()]


def test_a_child_is_one_generation_further_and_has_no_children() -> None:
    assert in_child(both) == [kernel.fork_generation() + 1, 0]


def test_a_grandchild_is_two_generations_further() -> None:
    assert in_child(lambda: in_child(both)) == [kernel.fork_generation() + 2, 0]


def test_a_fork_changes_the_parents_count_of_children_and_nothing_else() -> None:
    generation, children = both()
    in_child(both)
    in_child(both)
    assert both() == [generation, children + 2]


def test_a_childs_forks_do_not_count_for_its_parent() -> None:
    children = kernel.fork_children()

    def child() -> int:
        in_child(both)
        in_child(both)
        return kernel.fork_children()

    assert in_child(child) == 2
    assert kernel.fork_children() == children + 1


def test_siblings_are_of_one_generation() -> None:
    assert in_child(kernel.fork_generation) == in_child(kernel.fork_generation)


def test_a_fork_from_a_thread_counts_for_the_whole_process() -> None:
    children = kernel.fork_children()
    answers: list[list[int]] = []
    thread = threading.Thread(target=lambda: answers.append(in_child(both)))
    thread.start()
    thread.join()
    assert answers == [[kernel.fork_generation() + 1, 0]]
    assert kernel.fork_children() == children + 1
