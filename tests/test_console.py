"""What is printed where, in which units, and how progress looks on a terminal and in a log file."""

import io
import json
import time
from collections.abc import Callable
from contextlib import redirect_stderr

import pytest

from recap_cli import console
from recap_cli.errors import DataError
from recap_cli.progress import Label
from recap_cli.report.template import milliseconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def on_terminal(act: Callable[[], object]) -> str:
    """What `act` writes on standard error when that is a terminal. (pytest puts its own there before each test.)"""
    stream = Terminal()
    with redirect_stderr(stream):
        act()
    return stream.getvalue()


def test_results_go_to_stdout_and_the_rest_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.result("runs/cola")
    console.say("round 1 prune [bold]")
    console.error("no such thing", "try that")
    out, err = capsys.readouterr()
    assert out == "runs/cola\n"
    assert err == "round 1 prune [bold]\nerror: no such thing\nhint: try that\n"


def test_long_lines_are_never_broken(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/tmp/" + "long name " * 40 + "state.yaml"
    console.error(f"{path}: is truncated", f"recap status {path}")
    assert capsys.readouterr().err == f"error: {path}: is truncated\nhint: recap status {path}\n"


def test_json_has_null_for_what_json_cannot_say(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"loss": float("nan"), "rows": [(1, float("inf"))], "name": "ü"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": None, "rows": [[1, None]], "name": "ü"}
    assert not err


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("weights_bytes", 1_234_567, "1.2 MB"),
        ("parameters", 1_234_567, "1.23 M"),
        ("small_parameters", 5_314, "5,314"),
        ("kept_share", 0.666, "66.6%"),
        ("kept_share_of_prunable", 0.666, "66.6%"),
        ("prunable_full", 85_000_000, "85.00 M"),
        ("seconds.prune", 0.44, "0.4 s"),
        ("seconds", 125, "2 min 05 s"),
        ("seconds", 11_040, "3 h 04 min"),
        ("accuracy", 0.95123, "0.9512"),
        ("epochs", 12, "12"),
        ("stopped", True, "yes"),
        ("loss", float("nan"), "nan"),
        ("heads", [3, 2], "3 2"),
        ("best", None, ""),
    ],
)
def test_units_follow_from_the_key(key: str, value: object, text: str) -> None:
    assert console.value_text(key, value) == text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.2, "200 ms"),
        (0.2134, "213 ms"),
        (0.02134, "21.3 ms"),
        (0.002134, "2.13 ms"),
        (0.0002134, "0.213 ms"),
        (2.134, "2,134 ms"),
        (0.0, "0 ms"),
        (1e-12, "0.000000001 ms"),
    ],
)
def test_a_latency_has_three_digits_on_the_screen_and_in_a_page(seconds: float, shown: str) -> None:
    assert console.value_text("latency", seconds) == console.value_text("latency_seconds", seconds) == shown
    assert milliseconds(seconds) == shown


def test_records_become_a_table_without_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    console.records([{"name": "full", "metrics": {"f1": 0.5}}, {"name": "[red]best", "parameters": 2_000_000}], is_result=True)
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert lines[0] == ["name", "metrics", "f1", "parameters"]
    assert lines[2:] == [["full", "0.5000"], ["[red]best", "2.00", "M"]]
    assert "\x1b" not in out
    assert not err


def test_a_table_in_a_pipe_is_wider_than_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    console.table([f"a heading {i}" for i in range(7)], [["x"] * 7])
    assert "a heading 0   a heading 1" in capsys.readouterr().err


def test_a_narrow_screen_breaks_no_number(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [["1 *", "0.9512", "85.00 M", "1 min 01 s", "66.7%", "3,052 2,871 of 3,072", "a remark of many words, and more"]]
    console.table(["round", "accuracy", "full model", "time", "kept", "neurons", "note"], rows)
    err = capsys.readouterr().err
    for number in ("1 *", "0.9512", "85.00 M", "1 min 01 s", "66.7%", "3,052", "2,871", "3,072"):
        assert number in err
    console.table(["name", "note"], [["1.5", "words " * 12]])
    assert max(map(len, capsys.readouterr().err.splitlines())) <= 40


@pytest.fixture
def _slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock comes four seconds after the one before."""
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))


@pytest.mark.usefixtures("_slow_clock")
def test_progress_in_a_log_file_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.track(range(3), "finetune")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert not out
    assert "\x1b" not in err
    assert "\r" not in err
    first, last = err.splitlines()
    assert first == "finetune: 0 of 3 ..."
    assert last == "finetune: 3 of 3 in 16.0 s"


def test_a_short_loop_costs_a_log_file_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    list(console.track(range(3), "score"))
    assert capsys.readouterr().err == "score: 0 of 3 ...\n"


@pytest.mark.usefixtures("_slow_clock")
def test_progress_in_a_log_file_speaks_at_most_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    list(console.track(iter(range(6)), "score", 6))
    err = capsys.readouterr().err.splitlines()
    assert err[1] == "score: 3 of 6, 12.0 s, 12.0 s left"
    assert len(err) == 3


def test_what_a_label_has_to_say_stands_beside_the_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(console, "SHORT_SECONDS", 0.0)
    label = Label("finetune")
    for number in console.track(range(3), label):
        label.now = f"loss {number}.5"
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "finetune: 0 of 3 ..."
    assert [line.rpartition(", ")[2] for line in said[1:]] == ["loss 0.5", "loss 1.5", "loss 2.5"]

    def act() -> None:
        for number in console.track(range(3), label):
            label.now = f"loss {number}.5\x1b[2J"
            console._live[-1].refresh()

    shown = on_terminal(act)
    assert "loss 1.5" in shown
    assert "\x1b[2J" not in shown


@pytest.mark.usefixtures("_slow_clock")
def test_progress_without_a_total_counts(capsys: pytest.CaptureFixture[str]) -> None:
    list(console.track((i for i in range(2)), "read"))
    assert capsys.readouterr().err.splitlines()[-1].startswith("read: 2 in ")


def test_a_terminal_sees_a_bar_that_goes_when_the_loop_ends() -> None:
    def act() -> None:
        for _ in console.track(range(2), "mask [1/2]"):
            assert console._live
        assert not console._live

    shown = on_terminal(act)
    assert "mask [1/2]" in shown
    assert "━" in shown
    assert "0/2" in shown
    assert "\x1b[?25h" in shown  # the cursor is back


def test_loops_within_loops_share_the_screen() -> None:
    def act() -> None:
        seen = [(i, j) for i in console.track(range(2), "rounds") for j in console.track(range(2), "steps")]
        assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert not console._live

    assert "rounds" in on_terminal(act)


def test_a_line_is_printed_above_the_bar() -> None:
    def act() -> None:
        for _ in console.track(range(1), "rounds"):
            console.say("round 1 done")

    assert "round 1 done\n" in on_terminal(act)


def test_a_loop_that_breaks_leaves_no_bar() -> None:
    def act() -> None:
        loop = iter(console.track(range(9), "finetune"))
        next(loop)
        console.close()
        assert not console._live
        del loop
        console.error("stopped")

    assert on_terminal(act).endswith("stopped\n")


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in on_terminal(lambda: list(console.track(range(2), "mask")))


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[1;31m" in on_terminal(lambda: console.error("red"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in on_terminal(lambda: console.error("plain"))


HOSTILE = "\x1b[31mred\x07 \r\x9b2J\u202edne\x7f"
ESCAPED = r"\x1b[31mred\x07 \r\x9b2J\u202edne\x7f"


@pytest.mark.parametrize(
    "show",
    [
        console.say,
        console.line,
        console.error,
        lambda text: console.error("no", text),
        lambda text: console.table([text], [["1"]]),
        lambda text: console.table(["a"], [[text]]),
        lambda text: console.table(["a"], [["1"]], title=text),
        lambda text: list(console.track([1], text)),
    ],
)
def test_whatever_is_quoted_cannot_steer_the_terminal(
    show: Callable[[str], object], capsys: pytest.CaptureFixture[str]
) -> None:
    show(HOSTILE)
    shown = "".join(capsys.readouterr())
    assert ESCAPED.replace(" ", "") in "".join(shown.split())  # a title is folded
    assert not set(shown) & set("\x1b\x07\r\x9b\u202e\x7f")


def test_a_bar_cannot_steer_the_terminal() -> None:
    shown = on_terminal(lambda: list(console.track([1], "\x1b]0;title\x07")))
    assert r"\x1b]0;title\x07" in shown
    assert "\x1b]0;" not in shown


def test_json_escapes_control_characters_and_means_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"name": HOSTILE, "long": "x" * 50_000})
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\r\x9b\u202e\x7f")
    assert json.loads(out) == {"name": HOSTILE, "long": "x" * 50_000}


def test_a_result_is_printed_as_it_is_for_the_next_command_of_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    console.result("runs/" + HOSTILE + "x" * 9000)
    assert capsys.readouterr().out == "runs/" + HOSTILE + "x" * 9000 + "\n"


@pytest.mark.parametrize("text", ["x" * 200_000, "y\n" * 100_000, "\0" * 5000])
def test_of_what_is_too_long_the_beginning_and_the_end_are_shown(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.error(f"a.csv: {text} is no label")
    err = capsys.readouterr().err
    assert len(err) < 20_000
    assert err.startswith("error: a.csv: ")
    assert err.endswith(" is no label\n")
    assert "characters left out" in err


def test_an_error_is_legible_to_plain_python_too() -> None:
    error = DataError("\x1b[2J" + "x" * 200_000, hint="\x9b" + "y" * 200_000)
    for text in (str(error), error.message, error.hint or "", *error.__notes__):
        assert not set(text) & set("\x1b\x9b")
        assert 3000 < len(text) < 5000
