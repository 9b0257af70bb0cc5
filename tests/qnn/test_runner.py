"""The runner answers as the model in float does: prefill in the emulator, decode on the CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from buildsys.formats.safetensors_file import SafetensorsSource
from buildsys.models.image_samples import ImageSamples, Question, image_samples
from buildsys.models.open import open_model
from buildsys.models.runtime import load_module, logits
from buildsys.models.samples import Sample
from buildsys.rules.spec import Input
from buildsys.share import shared_folder
from buildsys.toolchains.finding import Found
from tests.rules.conftest import make_step, prepare_step

ASSETS = Path(shared_folder("recipes")) / "assets"
IMAGES = ASSETS / "evaluation/images"
# The first needs one chunk, the last one two: a chunk has 64 tokens, of which 36 are the image's.
LONG = "Look at the picture and think it over, then look again and say it at last: "
QUESTIONS = (
    ("0000.png", "What shape is at the bottom middle?"),
    ("0001.png", "Describe the top row."),
    ("0003.png", f"{LONG}What color is at the top left?"),
)


class Deployed(NamedTuple):
    """A folder as a device has it, and the compiler's Python."""

    folder: Path
    python: str

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, str(self.folder / "run.py"), *arguments],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def answer(self, *arguments: str) -> dict[str, Any]:
        done = self.run("--json", *arguments)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told


@pytest.fixture(scope="module")
def deployed(compiler: Found, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """qwen2vl-tiny, turned and balanced, as contexts with a small chunk, and its runner."""
    root = tmp_path_factory.mktemp("deployed")
    text = Input("text", "text", {"path": ASSETS / "calibration.txt"}, "t",
                 {"samples": 4, "tokens": 128})  # fmt: skip
    paths = {
        "path": ASSETS / "calibration/images",
        "prompts": ASSETS / "calibration/prompts.yaml",
        "answers": ASSETS / "calibration/answers.json",
    }
    images = Input("images", "images", paths, "i", {"samples": 12})
    given: dict[str, Any] = {"model": ASSETS / "qwen2vl-tiny"}

    def made(rule: str, name: str, inputs: Any = None, **options: Any) -> Path:
        step = prepare_step(
            root / f"make-{name}",
            rule,
            name,
            given if inputs is None else inputs,
            options,
            toolchain=dict(compiler.fields),
        )
        return make_step(rule, step).out

    def artifact(path: Path, digest: str) -> Input:
        return Input(path.name, "artifact", {"path": path}, digest)

    given["rotation"] = artifact(made("rotation", "rotation.bin"), "R")
    given["rescale"] = artifact(made("rescale", "rescale.safetensors"), "s")
    weights = made("rotated-checkpoint", "decode.safetensors")
    samples = [text, images]
    scales = made("activation-scales", "scales.json", {**given, "samples": samples}, points="graph")
    inputs = {**given, "scales": artifact(scales, "scales"), "samples": samples}
    contexts = made("qnn-context", "qnn", inputs, chunk=64, past=64, patches=144)
    script = made(
        "script", "run.py", {}, template="run_qnn_context.py.j2", contexts="qnn",
        weights="decode.safetensors",
    )  # fmt: skip
    folder = root / "device"
    shutil.copytree(contexts, folder / "qnn")
    for file in (weights, script):
        shutil.copy(file, folder)
    return Deployed(folder, str(compiler.fields["python"]))


@pytest.fixture(scope="module")
def pictures() -> ImageSamples:
    return image_samples(open_model(ASSETS / "qwen2vl-tiny"), IMAGES)


@torch.inference_mode()
def greedy(module: torch.nn.Module, sample: Sample, ends: list[int], most: int) -> list[int]:
    """The tokens of the float model, each from all before it anew."""
    found: list[int] = []
    while len(found) < most:
        ids = torch.cat([sample.input_ids, torch.tensor([found], dtype=torch.int64)], 1)
        whole = Sample(ids, sample.pixel_values, sample.image_grid_thw)
        found.append(int(logits(module, whole)[-1].argmax()))
        if found[-1] in ends:
            break
    return found


def test_answers_about_images_are_those_of_the_model_in_float(
    deployed: Deployed, pictures: ImageSamples
) -> None:
    module = load_module(open_model(ASSETS / "qwen2vl-tiny"))
    ends = json.loads((deployed.folder / "qnn/io.json").read_text())["prompt"]["ends"]
    lengths = []
    for image, prompt in QUESTIONS:
        sample = pictures.sample(Question(IMAGES / image, prompt, None))
        told = deployed.answer("--image", str(IMAGES / image), "--prompt", prompt, "--tokens", "24")
        lengths.append(told["prompt_tokens"])
        assert told["prompt_tokens"] == sample.input_ids.shape[1]
        assert told["tokens"] == greedy(module, sample, ends, 24), prompt
    assert min(lengths) <= 64 < max(lengths)  # one chunk, and more than one


def test_text_alone_is_answered_too(deployed: Deployed) -> None:
    model = open_model(ASSETS / "qwen2vl-tiny")
    contract = json.loads((deployed.folder / "qnn/io.json").read_text())
    told = deployed.answer("--prompt", "What is this?", "--tokens", "8")
    from buildsys.models.text import load_tokenizer, token_ids

    prompt = contract["prompt"]["text"].replace(contract["prompt"]["mark"], "What is this?")
    ids = torch.tensor([token_ids(load_tokenizer(model.folder), prompt)])
    expected = greedy(load_module(model), Sample(ids), contract["prompt"]["ends"], 8)
    assert told["tokens"] == expected
    assert told["image_tokens"] == 0


def test_patches_are_those_of_the_processor(deployed: Deployed, pictures: ImageSamples) -> None:
    """Any size and shape; the runner has neither torch nor transformers."""
    from PIL import Image

    program = (
        "import importlib.util, sys, numpy, json, pathlib\n"
        "spec = importlib.util.spec_from_file_location('runner', sys.argv[1])\n"
        "runner = importlib.util.module_from_spec(spec); spec.loader.exec_module(runner)\n"
        "told = json.loads((runner.HERE / 'qnn/io.json').read_text())\n"
        "for image in sys.argv[2:]:\n"
        "    made = runner.image_patches(image, told['vision'], told['image'])\n"
        "    numpy.savez(image + '.npz', patches=made[0], grid=made[1])\n"
    )
    files = []
    for width, height in ((168, 168), (40, 60), (300, 100), (97, 411)):
        file = deployed.folder / f"{width}x{height}.png"
        Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 100).convert("RGB").save(file)
        files.append(file)
    argv = [deployed.python, "-c", program, str(deployed.folder / "run.py"), *map(str, files)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    for file in files:
        sample = pictures.sample(Question(file, "?", None))
        with np.load(f"{file}.npz") as made:
            assert sample.image_grid_thw is not None
            assert sample.image_grid_thw.tolist() == [[1, *made["grid"].tolist()]]
            assert sample.pixel_values is not None
            np.testing.assert_allclose(made["patches"], sample.pixel_values.numpy(), atol=1e-5)


def test_weights_of_another_rotation_are_refused(deployed: Deployed, tmp_path: Path) -> None:
    other = tmp_path / "device"
    shutil.copytree(deployed.folder, other, ignore=shutil.ignore_patterns("*.png*"))
    contract = json.loads((other / "qnn/io.json").read_text())
    contract["made_with"]["rotation"] = "another"
    (other / "qnn/io.json").write_text(json.dumps(contract))
    done = Deployed(other, deployed.python).run("--prompt", "What is this?")
    assert done.returncode == 3
    assert "made with another rotation" in done.stderr


def test_what_does_not_fit_or_is_missing_is_said(deployed: Deployed, tmp_path: Path) -> None:
    done = deployed.run("--prompt", "word " * 200)
    assert (done.returncode, "the contexts take 128" in done.stderr) == (2, True)
    (tmp_path / "no.png").write_text("no image")
    done = deployed.run("--image", str(tmp_path / "no.png"))
    assert (done.returncode, "no image that can be read" in done.stderr) == (3, True)
    alone = Deployed(tmp_path, deployed.python)
    shutil.copy(deployed.folder / "run.py", tmp_path)
    done = alone.run()
    assert (done.returncode, "io.json is missing" in done.stderr) == (3, True)
    for line in (
        *deployed.run("--prompt", "x " * 300).stderr.splitlines(),
        *done.stderr.splitlines(),
    ):
        assert "Traceback" not in line


def test_the_weights_say_what_they_were_made_with(deployed: Deployed) -> None:
    metadata = SafetensorsSource(deployed.folder / "decode.safetensors").metadata
    assert (metadata["qbuild.rotation"], metadata["qbuild.rescale"]) == ("R", "s")
