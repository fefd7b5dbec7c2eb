"""The command line: its subcommands, and the one place where an error becomes a message and an exit code.

Printing help imports nothing heavy: each command imports what it needs when it is called.
"""

import errno
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from recap_cli import console, registry
from recap_cli.commands import (
    compare,
    compress,
    doctor,
    eval,
    export,
    finetune,
    init,
    mask,
    merge,
    plugins,
    profile_memory,
    prune,
    recipes,
    report,
    run,
    status,
)
from recap_cli.errors import DeviceMemoryError, PluginError, RecapError, StorageError, lacks_device_memory
from recap_cli.printable import printable
from recap_cli.process import interrupt

STOPPED = "stopped; the finished stages are kept, and nothing else"
INTERRUPTED = interrupt.INTERRUPTED
TRACEBACK = "RECAP_TRACEBACK"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = "1000"  # some tenths of a millisecond; the library's default of 300,000 takes a whole time slice on a busy machine
REFUSED = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
}

WHOLE, STAGE, LOOK = "Whole runs", "Stage by stage", "Look around"

app = typer.Typer(
    name="recap",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(rich_help_panel=WHOLE)(run.run)
app.command(rich_help_panel=WHOLE)(compress.compress)
app.command(rich_help_panel=WHOLE)(compare.compare)
app.command(rich_help_panel=WHOLE)(export.export)
app.command("profile-memory", rich_help_panel=WHOLE)(profile_memory.profile_memory)
for stage in (init.init, prune.prune, mask.mask, finetune.finetune, merge.merge):
    app.command(rich_help_panel=STAGE)(stage)
app.command(rich_help_panel=LOOK)(status.status)
app.command(rich_help_panel=LOOK)(report.report)
app.command("eval", rich_help_panel=LOOK)(eval.evaluate)
app.add_typer(recipes.app, name="recipes", rich_help_panel=LOOK)
app.command(rich_help_panel=LOOK)(plugins.plugins)
app.command(rich_help_panel=LOOK)(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        console.result(f"recap {metadata.version('recap-cli')}")
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


@app.callback()
def recap(version: VersionOption = False) -> None:
    """Finetune transformers that do not fit: prune, mask, finetune, merge, round by round.

    Example: [bold]recap run quickstart[/bold]
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line. With RECAP_TRACEBACK=1 each error comes with its traceback.

    Args:
        arguments: The words after `recap`; those of this process by default.

    Returns:
        The exit code: 0 done, 2 a wrong command line, 3 to 19 another error of `recap_cli.errors`, 130 stopped by Ctrl-C,
        1 anything else.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_streams()
    _quiet_libraries()
    _sleep_soon()
    registry.leave_out_broken()
    printed: list[str] = []  # the message on a stop, once it is printed: a second Ctrl-C does not repeat it

    def message() -> str:
        return "" if printed else f"error: {STOPPED}\nhint: {printable(_again(given))}\n"

    with interrupt.counted(message) as is_interrupted:
        try:
            return _run(given)
        except KeyboardInterrupt:
            return _stopped(given, printed)
        except BrokenPipeError:  # the reader of stdout has gone, as `head` does
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for the flush at exit)
            return 1
        except Exception as error:  # noqa: BLE001  (the last resort: everything becomes a message)
            return _stopped(given, printed) if is_interrupted() else _failed(error)
        finally:
            console.close()


def _run(arguments: list[str]) -> int:
    """Let Typer parse and call. It prints the errors of a wrong command line, and always ends with SystemExit."""
    try:
        app(arguments, prog_name="recap")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            raise KeyboardInterrupt from end
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _stopped(arguments: Sequence[str], printed: list[str]) -> int:
    console.close()
    console.error(STOPPED, _again(arguments))
    printed.append(STOPPED)
    return INTERRUPTED


def _again(arguments: Sequence[str]) -> str:
    """Return the hint with the command that continues: the same one, unless it was a stage that is already done."""
    if (done := interrupt.done()) and arguments[:1] not in (["run"], ["compress"]):
        return done
    return f"continue with `{shlex.join(['recap', *arguments])}`"


def _failed(error: Exception) -> int:
    console.close()
    if os.environ.get(TRACEBACK, "") not in ("", "0"):
        for line in "".join(traceback.format_exception(error)).rstrip().split("\n"):
            console.say(line)
    ours = _explained(error)
    console.error(ours.message, ours.hint)
    return ours.exit_code


def _explained(error: Exception) -> RecapError:
    """Return the error to show. A full disk or memory has its type of error; what no code expects is a bug of RECAP."""
    if isinstance(error, PluginError) and isinstance(error.__cause__, Exception) and _lacks_memory(error.__cause__):
        return _explained(error.__cause__)  # memory that ran out in a plugin is not the plugin's fault
    if isinstance(error, RecapError):
        return error
    if isinstance(error, OSError) and error.errno in REFUSED:
        place = f"{error.filename}: " if error.filename else ""
        return StorageError(f"{place}{REFUSED[error.errno]}", hint="make room, or name another folder; the state is as it was")
    if _lacks_memory(error):
        return _out_of_memory(error)
    return RecapError(
        f"this is a bug in recap: {type(error).__name__}: {error} ({_place(error)})",
        hint=f"{TRACEBACK}=1 in the environment shows the traceback; please report it with the command",
    )


def _out_of_memory(error: Exception) -> RecapError:
    """Return the error for memory that ran out, of a device or of the machine. `finetune` has a better one of its device."""
    first = str(error).partition("\n")[0]
    message = f"out of memory{f': {first}' if first else ''}"
    if lacks_device_memory(error):
        return DeviceMemoryError(
            message,
            hint="the state is as it was: the same recap run with --set importance.device=cpu, or with a smaller "
            "evaluate.batch_size, continues it",
        )
    return StorageError(
        message,
        hint="try --set finetune.micro_batch_size=8, finetune.checkpointing=true, finetune.fused_backward=true "
        "or finetune.weights=bf16: the state is as it was, and recap run --state DIR --set … continues it",
    )


def _lacks_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's, an accelerator's, or torch's on the CPU, which only its message shows."""
    if isinstance(error, MemoryError) or lacks_device_memory(error):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "DefaultCPUAllocator")
    )


def _place(error: Exception) -> str:
    """Return the file and line where the error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "nowhere"


def _open_streams() -> None:
    """Replace a closed stream by one that discards, and escape characters that a stream's encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (open until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    """Keep the progress bars of the hub's libraries out of log files; a terminal may show them."""
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def _sleep_soon() -> None:
    """Let OpenMP's threads spin only briefly at a barrier before they sleep, unless the environment sets how they wait.

    OpenMP reads this when torch is imported, so it must be set before. Measured on two cores under a load of 12 with two
    threads, in ms per step of a model with hidden size 192: 4,903 with the default, 1,363 with 2,000, 924 with 0. One thread
    takes 931.
    """
    if not any(os.environ.get(name) for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPINS
