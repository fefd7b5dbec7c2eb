"""What others have in processes of their own, by calls in this one: where a test is not about processes."""

from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout

from recap_cli.cli import main
from recap_cli.compare import processes


def here(waiting: list[processes.Process], _jobs: int) -> Iterator[processes.Ended]:
    """What `processes.run` does, by calls in this process."""
    for one in waiting:
        with one.log.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            code = main(list(one.command)[list(one.command).index("recap_cli") + 1 :])
        yield processes.Ended(one.name, f"it ended with {code}" if code else None)
