"""What tests of several folders share."""

import atexit
import ctypes
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would its children

LIKE = {  # a pico model → one of the same adapter's tables, or of the same blocks, that `pytest` alone tests too
    "deit": "vit",
    "dinov2-swiglu": "dinov2",
    "roberta": "bert",
    "electra": "bert",
    "timm-vit-distilled": "timm-vit",
    "timm-vit-packed-glu": "timm-vit",
    "timm-vit-qk-norm": "timm-vit",
    "dpt": "vit",
    "data2vec-vision": "beit",
    "upernet": "swin",
    "maskformer": "mask2former",
    "oneformer": "mask2former",
}
ROOM_BYTES = 4 * 2**30
LONG = (  # files of 3 s and more, the longest first: one that begins last would leave the other worker idle
    "tests/fuzz/test_fuzz.py",
    "tests/faults/test_faults.py",
    "tests/stages/test_algorithm.py",
    "tests/memory/test_fake_step.py",
    "tests/test_kill.py",
    "tests/stages/test_stages.py",
    "tests/stages/test_methods.py",
    "tests/trainable/test_token_rows.py",
    "tests/commands/test_profile_memory.py",
    "tests/stages/test_algorithm_settings.py",
    "tests/stages/test_own_teacher.py",
    "tests/stages/test_invariants.py",
    "tests/report/test_report.py",
    "tests/stages/test_hidden_states.py",
    "tests/test_extras.py",
    "tests/stages/test_distillation.py",
    "tests/state/test_damage.py",
    "tests/memory/test_predict.py",
    "tests/stages/test_strange_models.py",
    "tests/stages/test_compensation.py",
    "tests/test_docs.py",
    "tests/report/test_pages.py",
    "tests/report/test_segmentation.py",
    "tests/core/test_segmentation_adapters.py",
    "tests/compare/test_runner.py",
    "tests/rounds/test_plans.py",
    "tests/memory/test_budget.py",
    "tests/models/test_export.py",
    "tests/models/test_export_segmentation.py",
    "tests/stages/test_ties.py",
    "tests/core/test_importance.py",
    "tests/stages/test_best.py",
    "tests/commands/test_compare.py",
    "tests/test_registry.py",
    "tests/report/test_joined.py",
    "tests/state/test_links_and_stops.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Folders of tests lie in the machine's memory where it has room: stages wait for the disk, and no test pulls its plug.

    A `TMPDIR` that is set is left as it is; workers, and the processes that tests start, have that of the first process.
    """
    place = "/dev/shm"
    if "TMPDIR" not in os.environ and os.path.isdir(place) and shutil.disk_usage(place).free > ROOM_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", place)  # of `tmp_path`, which stays where a test has failed
        folder = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="recap-tests-", dir=place)
        tempfile.tempdir = None
        Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-1000)  # after the folder that fork servers have in it


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported to collect is no garbage; to look through it as it grew took a quarter of the time of collecting."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)  # models of 32 dimensions leave little: 5 % of a test's time went into looking for it
        gc.enable()
        atexit.register(gc.unfreeze)  # libraries count then what was not let go; pytest looks ten times for garbage before


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: with `--dist loadfile` each is the work of one worker. Models like another one are for `make wide`."""
    for item in items:
        params = getattr(item, "callspec", None)
        if (
            params is not None
            and item.get_closest_marker("proof") is None
            and any(isinstance(value, str) and value in LIKE for value in params.params.values())
        ):
            item.add_marker(pytest.mark.wide)
    rank = {file: place for place, file in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(LONG)))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test, or the command line that it calls, sets in the environment is gone after it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="session")
def coarse() -> Iterator[None]:
    """Pictures of points are drawn with a fifth of them on each side: no test counts them."""
    from recap_cli.memory import picture

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(picture.STYLE, "savefig.dpi", 60)
        yield


@pytest.fixture
def permissions() -> Iterator[None]:
    """The permissions of files count, for root too: its capabilities to read and write everything are laid down for a test."""
    if os.name != "nt" and os.geteuid() == 0:
        with without_override():
            yield
    else:
        yield


@contextmanager
def without_override() -> Iterator[None]:
    """Inside, this thread is without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (capabilities(7)), which root has on Linux."""
    if sys.platform != "linux":
        pytest.skip("root's right to write everywhere can be laid down on Linux only")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3; this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, of capabilities 0 to 31; the same of 32 to 63
    _check(libc.capget(header, sets))
    effective = sets[0]
    sets[0] = effective & ~(1 << 1 | 1 << 2)
    _check(libc.capset(header, sets))
    try:
        yield
    finally:
        sets[0] = effective
        _check(libc.capset(header, sets))


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "capabilities")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps on tiny models: threads that wait for each other cost more there than they save, and another number other bits."""
    import torch  # not at the top: the process that only hands out the files has no need of it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
