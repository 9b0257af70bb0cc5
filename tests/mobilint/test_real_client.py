"""The vendor's own client loads what the rules make, and feeds its NPU what it was compiled for.

`transformers-mblt` from PyPI in an environment of its own, under both transformers that it is
held to. Only the handle of the card is not real (client/load_folder.py): it writes down what it
is fed. Skipped, with the reason, where PyPI cannot be reached.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from buildsys.formats.npy_set import read_list
from buildsys.formats.rotation_file import load_rotation
from buildsys.models.image_samples import image_samples
from buildsys.models.npu_language import NpuLanguage
from buildsys.models.open import open_model
from buildsys.models.runtime import load_module, model_inputs
from tests import tiny_models
from tests.mobilint.test_compilers import Room

CLIENT = ("transformers-mblt==0.6.1", "mblt-npu-python==0.1.0", "mobilint-qb-runtime==1.5.0")
PROGRAM = Path(__file__).parent / "client" / "load_folder.py"
KEYS = ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight")


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """client("4.57.1"): the Python of an environment with that transformers and the client."""
    made: dict[str, Path] = {}

    def prepare(transformers: str) -> Path:
        if transformers not in made:
            made[transformers] = _environment(tmp_path_factory.mktemp("client"), transformers)
        return made[transformers]

    return prepare


def _environment(folder: Path, transformers: str) -> Path:
    """torch and the rest come from this Python; what differs is installed over it."""
    venv.create(folder, with_pip=False)
    own = next(folder.glob("lib/python3*/site-packages"))
    (own / "zz_torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-compile"]
    for words in ([f"transformers=={transformers}"], ["--no-deps", *CLIENT]):
        try:
            done = subprocess.run([*pip, *words], capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip("PyPI did not answer within two minutes")
        if done.returncode != 0:
            pytest.skip(f"the client cannot be installed: {done.stderr.strip()[-300:]}")
    return python


@pytest.fixture
def classic(qwen2vl_folder: Path, tmp_path: Path) -> Path:
    """The tiny model in the layout of the hub's checkpoints."""
    return tiny_models.classic_folder(qwen2vl_folder, tmp_path / "classic")


@pytest.fixture
def deployed(
    make: Any, classic: Path, images: Path, compiler: Any, in_process: None
) -> Callable[..., tuple[Path, Path]]:
    """deployed(**options of rotated-embedding): (deploy folder, rotation file)."""

    def build(**embedding: Any) -> tuple[Path, Path]:
        here = Room(make, classic, images, compiler("1.1"))
        text = here.mxq(
            "language", here.mblt("language").out, here.calibration("language").out, "rotation"
        )
        rotation = here.artifact(text.output("rotation"))
        vision = here.mxq(
            "vision", here.mblt("vision").out, here.calibration("vision").out,
            rotation=rotation.path,
        )  # fmt: skip
        parts = {"model": classic, "text": text.out, "vision": vision.out, "rotation": rotation}
        config = make("mobilint-config", "config.json", parts)
        inputs = {"model": classic, "rotation": rotation}
        turned = make("rotated-embedding", "model.safetensors", inputs, embedding)
        del parts["rotation"]
        whole = {**parts, "config": config.out, "embedding": turned.out}
        return make("mobilint-model", "deploy", whole).out, rotation.path

    return build


def prompt_of(model_folder: Path, images: Path, R: torch.Tensor, target: Path) -> dict[str, Any]:
    """What the NPU is to answer: computed by transformers' modules and our patches."""
    model = open_model(model_folder)
    sample = next(iter(image_samples(model, images, size=[56, 56])))
    assert sample.pixel_values is not None
    assert sample.image_grid_thw is not None
    module: Any = load_module(model)
    inputs = model_inputs(module, sample)
    captured: list[torch.Tensor] = []
    module.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: captured.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.inference_mode():
        first = module(**inputs).logits[0, -1]
        visual = module.model.visual(sample.pixel_values, grid_thw=sample.image_grid_thw)
        embedded = captured[0]
        token = module.get_input_embeddings()(first.argmax())[None, None]
        positions = inputs["position_ids"]
        assert isinstance(positions, torch.Tensor)
        longer = torch.cat([positions, positions[:, :, -1:] + 1], dim=-1)
        patched = NpuLanguage(module, positions=512)
        second = patched(torch.cat([embedded, token], dim=1), longer)[0, 0]
    content = {
        "hidden_size": len(R),
        "image": np.load(read_first(images, model_folder, target)),
        "logits": torch.stack([first, second]).numpy(),
        "vision_output": (visual.pooler_output.double() @ R).float().numpy(),
        "input_ids": sample.input_ids.numpy(),
        "pixel_values": sample.pixel_values.numpy(),
        "image_grid_thw": sample.image_grid_thw.numpy(),
        "image_token": model.config.image_token_id,
    }
    np.savez(target, **content)
    return {**content, "fed": (torch.cat([embedded, token], 1)[0].double() @ R).numpy()}


def read_first(images: Path, model_folder: Path, target: Path) -> Path:
    """The first image as rule calibration-set gives it to the compiler."""
    from buildsys.formats.npy_set import write_index, write_sample
    from buildsys.models.calibration import vision_image

    model = open_model(model_folder)
    sample = next(iter(image_samples(model, images, size=[56, 56])))
    folder = target.parent / "calibration"
    folder.mkdir()
    write_sample(folder, 0, "images", vision_image(model, sample, torch.float32))
    write_index(folder, "images", [0], {})
    return read_list(folder)[0]


def answer(python: Path, folder: Path, prompt: Path, fed: Path) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(python), str(PROGRAM), str(folder), str(prompt), str(fed)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=prompt.parent,
        timeout=120,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("ANSWER "))
    return found


@pytest.mark.parametrize("transformers", ["4.57.1", "5.17.0"])
def test_the_client_loads_the_folder_and_feeds_the_npu_rotated_embeddings(
    transformers: str, client: Any, deployed: Any, classic: Path, images: Path, tmp_path: Path
) -> None:
    python = client(transformers)
    folder, rotation = deployed()
    R = load_rotation(rotation).R
    expected = prompt_of(classic, images, R, tmp_path / "prompt.npz")
    found = answer(python, folder, tmp_path / "prompt.npz", tmp_path / "fed.npz")
    assert found["transformers"] == transformers
    assert found["config"] == "MobilintQwen2VLConfig"
    assert (found["missing"], found["unexpected"]) == ([], [])
    assert set(found["modes"].values()) == {"CoreMode.Global8"}
    assert {part: Path(path).name for part, path in found["paths"].items()} == {
        "text": "language.mxq",
        "vision": "vision.mxq",
    }
    assert len(found["rotation"]["rotation"]) == 64
    # The two tokens that transformers' own module answers with.
    assert found["tokens"] == expected["logits"].argmax(axis=-1).tolist()
    fed = np.load(tmp_path / "fed.npz")
    stored = load_file(folder / "model.safetensors")[KEYS[0]]
    assert np.array_equal(fed["embedding"], stored)
    # The card sees the image as the compiler was calibrated with, bit for bit ...
    assert np.array_equal(fed["vision"][0], expected["image"])
    # ... and of every token the embedding times the mxq's own rotation.
    assert np.abs(fed["text"][0, 0] - expected["fed"]).max() < 1e-5


def test_the_vendors_own_key_is_lost_under_transformers_5_and_that_is_seen(
    client: Any, deployed: Any, classic: Path, images: Path, tmp_path: Path
) -> None:
    """Why `embedding_key` has the default that it has."""
    python = client("5.17.0")
    folder, rotation = deployed(embedding_key=KEYS[1])
    prompt_of(classic, images, load_rotation(rotation).R, tmp_path / "prompt.npz")
    found = answer(python, folder, tmp_path / "prompt.npz", tmp_path / "fed.npz")
    assert found["missing"] == [KEYS[0]]
    assert found["unexpected"] == [KEYS[1]]


def test_the_vendors_runtime_refuses_what_is_no_mxq(client: Any, tmp_path: Path) -> None:
    """`qbuild inspect` of an .mxq asks the real runtime, which needs no card."""
    (tmp_path / "a.mxq").write_bytes(b".MXQ and nothing of its own after it")
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[3])}
    done = subprocess.run(
        [str(client("5.17.0")), "-m", "buildsys", "inspect", str(tmp_path / "a.mxq")],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Mobilint's runtime cannot read it" in done.stderr


def test_the_run_script_says_that_the_card_is_missing(client: Any, tmp_path: Path) -> None:
    """The preflight of run_mblt.py, with the vendor's runtime and no card."""
    from buildsys.rules.script import find_template, render

    source = find_template("run_mblt.py.j2").read_text(encoding="utf-8")
    script = tmp_path / "run_mblt.py"
    script.write_text(render(source, {"mxq": ["a.mxq"]}, "run_mblt.py.j2"), encoding="utf-8")
    words = [str(client("5.17.0")), str(script), "--image", "photo.png", "--check"]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").touch()
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "model.safetensors is missing" in done.stderr) == (3, True)
    (folder / "model.safetensors").touch()
    (folder / "a.mxq").touch()
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "no NPU is found" in done.stderr) == (3, True)
