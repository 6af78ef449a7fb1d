"""Looking at what XLA compiles."""

import contextlib
import re
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that grows whenever XLA compiles something in this process."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def calls_host(program: str) -> bool:
    """Whether an optimized program calls Python."""
    return re.search('custom_call_target="[^"]*callback', program) is not None


def loops_around(op: str, program: str) -> set[int]:
    """In how many loops each occurrence of an operation is.

    Args:
      op: As XLA calls it.
      program: The text of an optimized program.

    Returns:
      The numbers of loops.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    todo, found = [(entry, 0)], set[tuple[str, int]]()
    while todo:
        if (at := todo.pop()) in found:
            continue
        found.add(at)
        for line in computations[at[0]]:
            depth = at[1] + (" while(" in line)
            names = re.findall(r"%([\w.-]+)", line)
            todo += [(name, depth) for name in names if name in computations]
    return {
        depth for name, depth in found if f" {op}(" in "\n".join(computations[name])
    }
