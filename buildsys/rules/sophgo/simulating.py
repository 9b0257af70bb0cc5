"""Runs a bmodel in the simulator that comes with the compiler, and compares it with float32."""

from __future__ import annotations

import subprocess
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.rules.sophgo.compiling import package_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from buildsys.formats.bmodel_file import BModel
    from buildsys.models.open import Model
    from buildsys.rules.sophgo.reference import Reference
    from buildsys.rules.spec import StepContext

# The simulator of each chip, and the library through which programs reach it.
SIMULATORS = {
    "BM1684X": ("libcmodel_bm1684x.so", "libbmlib_bm1684x.so.0"),
    "BM1688": ("libcmodel_bm1688.so", "libbmlib_bm1684x.so.0"),
    "CV186X": ("libcmodel_bm1688.so", "libbmlib_bm1684x.so.0"),
    "BM1684X2": ("libcmodel_bm1684x2.so", "libbmlib_bm1684x2.so.0"),
}
LAST_LINES = 6


def request_of(model: Model, made: BModel, reference: Reference) -> dict[str, Any]:
    """The arrays that the program in the simulator is given."""
    import numpy

    from buildsys.rules.sophgo.reference import patch_positions

    ids = reference.sample.input_ids[0].numpy().astype("i4")
    forced = ids[reference.prompt :]
    layers = model.config.num_hidden_layers
    names = {net.name for net in made.nets}
    request: dict[str, Any] = {
        "tokens": ids[: reference.prompt],
        "forced": forced,
        "positions": reference.positions.numpy().astype("i4"),
        "layers": numpy.array(layers),
    }
    calls = (layers + 1) * (1 + len(forced))
    if "embedding" in names:
        calls += 1 + len(forced)
    else:
        request["embeddings"] = reference.embeddings.numpy()
    if reference.vision is not None:
        calls += 1
        vision = model.config.vision
        assert vision is not None
        assert reference.sample.pixel_values is not None
        request["pixels"] = reference.sample.pixel_values.numpy()
        places = patch_positions(reference.sample, vision.spatial_merge_size)
        request["patch_positions"] = places.numpy().astype("i4")
        request["image_rows"] = numpy.flatnonzero(request["tokens"] == model.config.image_token_id)
    return {**request, "calls": numpy.array(calls)}


def simulate(
    step: StepContext,
    made: BModel,
    request: Mapping[str, Any],
    work: Path,
    told: Callable[[int, int], None],
) -> dict[str, Any]:
    """What the bmodel gives. Raises StepError where it does not run."""
    import numpy

    from buildsys.rules.sophgo.in_simulator import run_bmodel

    libraries = _libraries(step, made, work)
    numpy.savez(work / "request.npz", **request)
    argv = [step.toolchain["python"], run_bmodel.__file__, str(made.path)]
    argv += [str(package_of(step) / "python"), "request.npz", "result.npz"]
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        argv,
        cwd=work,
        env=_environment(libraries, work),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.split()
            if words[:1] == ["qbuild"]:
                told(int(words[1]), int(words[2]))
            elif words:
                step.log.info("%s", line.rstrip())
                last.append(line.rstrip())
    if process.returncode != 0:
        said = "\n".join(f"  {line[:300]}" for line in last)
        raise StepError(
            f"{made.path.name} does not run in the simulator "
            f"(exit code {process.returncode}); it said last:\n{said}",
            remedy=f"`qbuild log {step.name}` shows all that it said.",
        )
    return dict(numpy.load(work / "result.npz"))


def _libraries(step: StepContext, made: BModel, work: Path) -> Path:
    """Links to the compiler's libraries, with this chip's simulator under the name by which it
    is loaded. The compiler's own scripts change that link in the installation, for everyone."""
    if made.chip not in SIMULATORS:
        raise StepError(
            f"{made.path.name} is for {made.chip}, which has no simulator here",
            remedy=f"There are simulators of {', '.join(SIMULATORS)}.",
        )
    simulator, library = SIMULATORS[made.chip]
    chosen = {"libcmodel.so": simulator, "libbmlib.so.0": library}
    folder = work / "root" / "lib"
    folder.mkdir(parents=True)
    own = package_of(step) / "lib"
    for path in own.iterdir():
        (folder / path.name).symlink_to(own / chosen.get(path.name, path.name))
    return folder


def _environment(libraries: Path, work: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "LD_LIBRARY_PATH": str(libraries),
        "TPUC_ROOT": str(libraries.parent),
        "HOME": str(work),
        "TMPDIR": str(work),
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
