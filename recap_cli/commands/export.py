"""`recap export`: write the best small model, or the full one, so that plain Python loads it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, open_state
from recap_cli.errors import UsageError

FORMS = {
    "stock": "a plain checkpoint of the library",
    "dense": "a plain checkpoint of the original shapes, zero where it was pruned",
    "ragged": "a checkpoint whose layers differ in size",
}
STATE = typer.Argument(metavar="DIR", help="The state's folder.", show_default=False)
OUT = typer.Argument(metavar="OUT", help="The new folder for the model.", show_default=False)
WHICH = typer.Option("--which", metavar="NAME", help="best, the small model; or full, with what all rounds have trained.")
DENSE = typer.Option("--dense", help="Write the original shapes, filled with zeros: the same logits in a plain checkpoint.")


def export(
    folder: Annotated[Path, STATE],
    out: Annotated[Path, OUT],
    which: Annotated[str, WHICH] = "best",
    dense: Annotated[bool, DENSE] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the best small model of a state, with its tokenizer or image processor, and print how to load it.

    It then loads the export, and compares its logits with those of the model.

    Example: [bold]recap export runs/cola cola-small[/bold]
    """
    if which not in ("best", "full"):
        raise UsageError(f"--which {which}: a state has no such model to export", hint="name best or full")
    if which == "full" and dense:
        raise UsageError("--dense: nothing is pruned of the full model", hint="leave out --dense")
    state = open_state(folder)
    from recap_cli.stages import export as stage

    facts = stage.export(state, out, which="full" if which == "full" else "best", dense=dense, track=console.track)
    if as_json:
        console.emit_json(facts)
        return
    console.say(f"wrote {FORMS[facts['form']]}{f' ({reason})' if (reason := facts['reason']) else ''}")
    console.say("Load it with:")
    for line in _load_lines(facts, str(out)):
        console.say(f"    {line}")
    console.result(str(facts["path"]))


def _load_lines(facts: dict[str, Any], out: str) -> list[str]:
    """Return the lines of Python that load the export: with RECAP always, with the library if it can load the form."""
    lines = ["import recap_cli", f"model = recap_cli.load({out!r})"]
    if facts["form"] != "ragged" and facts["auto_class"] is not None:
        lines.append(f"# or without recap: transformers.{facts['auto_class']}.from_pretrained({out!r})")
    if told := [name for name, value in facts["forward"].items() if isinstance(value, list)]:
        lines.append(f"# call it with {' and '.join(told)} too: the row stands in spec.json, under forward")
    return lines
