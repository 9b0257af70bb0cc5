"""Loads a deploy folder with Mobilint's own client and answers one prompt with it.

Runs in the client's environment, apart from qbuild. Only the handle of the NPU is not real: it
is fed what the client would feed the card, writes that down, and gives back arrays that were
computed beforehand.

Usage: load_folder.py FOLDER PROMPT.npz FED.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

FED: dict[str, list[np.ndarray]] = {"text": [], "vision": []}
MODES: dict[str, str] = {}
PATHS: dict[str, str] = {}
PROMPT: Any = None


class Accelerator:
    def __init__(self, *given: Any) -> None:
        self.given = given


class Buffer:
    max_cache_size = 512


class Model:
    """The handle of one mxq: what the client asks of it, and nothing else."""

    def __init__(self, path: str, config: Any) -> None:
        assert Path(path).read_bytes()
        self.part = "vision" if "vision" in Path(path).name else "text"
        MODES[self.part] = str(config.get_core_mode())
        PATHS[self.part] = path

    def get_model_variant_handle(self, number: int) -> Model:
        return self

    def get_model_input_shape(self) -> list[list[int]]:
        if self.part == "text":
            return [[1, 1, int(PROMPT["hidden_size"])]]
        return [list(PROMPT["image"].shape)]

    def get_model_output_shape(self) -> list[list[int]]:
        return [[1, 1, PROMPT["logits"].shape[-1]]]

    def get_cache_infos(self) -> list[Any]:
        return []

    def get_input_buffer_info(self) -> list[Buffer]:
        return [Buffer()]

    def launch(self, accelerator: Accelerator) -> None:
        assert isinstance(accelerator, Accelerator)

    def dispose(self) -> None:
        return

    def infer(self, inputs: list[np.ndarray], *more: Any) -> list[np.ndarray]:
        (array,) = inputs
        assert array.dtype == np.float32
        FED[self.part].append(array.copy())
        if self.part == "vision":
            return [PROMPT["vision_output"]]
        # The client may feed the prompt at once or token by token, as its transformers has it.
        seen = sum(each.shape[2] for each in FED["text"])
        answered = max(0, seen - PROMPT["input_ids"].shape[1])
        return [PROMPT["logits"][answered][None, None, None]]


def main() -> None:
    global PROMPT
    folder, prompt, fed = sys.argv[1:]
    PROMPT = np.load(prompt)
    import mblt_npu.npu_backend as backend
    import transformers

    backend.Accelerator, backend.Model = Accelerator, Model
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers_mblt.models.qwen2_vl import modeling_qwen2_vl  # registers itself

    config = AutoConfig.from_pretrained(folder)
    model, told = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, modeling_qwen2_vl.MobilintQwen2VLForConditionalGeneration)
    inputs = {
        name: torch.from_numpy(PROMPT[name])
        for name in ("input_ids", "pixel_values", "image_grid_thw")
    }
    if int(transformers.__version__.split(".")[0]) >= 5:
        image = inputs["input_ids"] == int(PROMPT["image_token"])
        inputs["mm_token_type_ids"] = image.to(torch.int32)
    mask = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        ids = model.generate(**inputs, attention_mask=mask, max_new_tokens=2, do_sample=False)
    embedding = model.get_input_embeddings().weight
    np.savez(
        fed,
        embedding=embedding.detach().float().numpy(),
        text=np.concatenate(FED["text"], axis=2),
        vision=np.stack(FED["vision"]),
    )
    tokens = ids[0, inputs["input_ids"].shape[1] :].tolist()
    answer = {
        "transformers": transformers.__version__,
        "config": type(config).__name__,
        "missing": sorted(map(str, told["missing_keys"])),
        "unexpected": sorted(map(str, told["unexpected_keys"])),
        "dtype": str(embedding.dtype),
        "modes": MODES,
        "paths": PATHS,
        "rotation": getattr(config, "qbuild", None),
        "tokens": tokens,
    }
    print("ANSWER " + json.dumps(answer))


if __name__ == "__main__":
    main()
