"""`recap doctor`: what this machine and this installation offer. It trains nothing."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from recap_cli import console, extras, registry
from recap_cli.commands.arguments import JsonOption

PACKAGES = ("recap-cli", "torch", "torchvision", "transformers", "timm", "datasets", "safetensors", "typer", "pydantic")


def doctor(as_json: JsonOption = False) -> None:
    """Show versions, extras, devices, memory and folders, and what is wrong with them. The exit code is 1 if something is.

    Example: [bold]recap doctor[/bold]
    """
    versions = {name: _version(name) for name in PACKAGES}
    devices, driver, problems = _devices()
    problems += [f"{name} is not installed" for name, version in versions.items() if version is None]
    problems += [
        f"{one.distribution} {one.version}: {one.problem}; its plugins are ignored: repair or uninstall it"
        for one in registry.broken()
    ]
    folders = {"cache": _folder(_cache()), "working directory": _folder(Path.cwd())}
    problems += [f"{folder['path']} cannot be written" for folder in folders.values() if not folder["writable"]]
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "extras": {name: extras.is_installed(name) for name in extras.EXTRAS},
        "devices": devices,
        **driver,
        "memory": _memory(),
        "folders": folders,
        "problems": problems,
    }
    if as_json:
        console.emit_json(found)
    else:
        _print(found)
    raise typer.Exit(1 if problems else 0)


def _print(found: dict[str, Any]) -> None:
    rows = [["python", found["python"]], ["platform", found["platform"]]]
    rows += [[name, version or "missing"] for name, version in found["versions"].items()]
    for name, installed in found["extras"].items():
        rows.append([f"extra {name}", "installed" if installed else f"not installed: {extras.pip_command(name)}"])
    for device in found["devices"]:
        free = f", {console.megabytes(device['free_bytes'])} free" if "free_bytes" in device else ""
        rows.append([device["device"], f"{device['name']}{free}{_holders(device)}"])
    rows += [[name, found[name]] for name in ("driver", "nvml", "threads", "waiting", "load") if found.get(name)]
    memory = found["memory"]
    free, total = console.megabytes(memory["available_bytes"]), console.megabytes(memory["total_bytes"])
    rows.append(["memory", f"{free} free of {total}"])
    for name, folder in found["folders"].items():
        rows.append([name, f"{folder['path']}, {console.megabytes(folder['free_bytes'])} free"])
    rows += [["problem", problem] for problem in found["problems"]]
    console.table(["what", "found"], rows, is_result=True)


def _holders(device: dict[str, Any]) -> str:
    """Return what other processes hold of a device, or why that is unknown; empty for a device without processes."""
    held = device.get("other_processes_bytes")
    texts = [] if held is None else [f"{console.megabytes(held)} held by other processes"]
    texts += [f"not seen: {text}" for text in device.get("not_seen", ())]
    return "".join(f", {text}" for text in texts)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # this is the question that was asked
        return None


def _devices() -> tuple[list[dict[str, Any]], dict[str, str | None], list[str]]:
    """Return torch's devices, the facts of the NVIDIA driver, and problems of torch and torchvision. Imports take seconds."""
    try:
        import torch

        from recap_cli.machine import facts as stage
    except (ImportError, OSError) as error:  # a torch that does not load is a finding
        return [], {}, [f"torch cannot be imported: {error}"]
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}"}]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        facts = {"device": f"cuda:{index}", "name": name, "free_bytes": free, "total_bytes": total}
        devices.append({**facts, **stage.holders(index)})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU"})
    wrong = extras.torchvision_problem()
    return devices, {**stage.driver(), **stage.computing()}, [] if wrong is None else ["; ".join(wrong)]


def _memory() -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total_bytes": memory.total, "available_bytes": memory.available}


def _cache() -> Path:
    """Return the folder in which the hub's libraries keep models and data sets."""
    if given := os.environ.get("HF_HOME"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"


def _folder(path: Path) -> dict[str, Any]:
    """Return whether a folder can be written and how much is free. If it does not exist, the nearest parent counts."""
    nearest = next(place for place in (path, *path.parents) if place.exists())
    return {"path": str(path), "writable": os.access(nearest, os.W_OK), "free_bytes": shutil.disk_usage(nearest).free}
