"""Text as a model reads it: the folder's own tokenizer.json and chat template.

tokenizer.json is read by `tokenizers` itself, because transformers 5 replaces its pre-tokenizer
by the model type's own, whatever the file says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.models.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises ModelError where there is none, or it is damaged."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(
            "does not exist", file=file, remedy="Samples need the model's tokenizer.json beside it."
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception for every fault
        raise ModelError(f"is no tokenizer ({error})", file=file) from error


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text, special ones where they are written out, none added."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


class ChatTemplate:
    """Renders prompts as a model's chat template has them.

    Rendered with transformers' own sandbox, so that a template cannot run code.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        from transformers import PreTrainedTokenizerFast

        self._template, self._file = _read_template(folder)
        self._renderer: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    def prompt(self, text: str, images: int = 0) -> str:
        """One user turn with `images` images before the text, up to where the answer begins."""
        return self._render(_turn(text, images), add_generation_prompt=True)

    def answered(self, text: str, answer: str, images: int = 0) -> tuple[str, str]:
        """(prompt, answer with the end of its turn). Raises ModelError for an odd template."""
        prompt = self.prompt(text, images)
        turns = [*_turn(text, images), {"role": "assistant", "content": answer}]
        whole = self._render(turns, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ModelError(
                "an answered chat does not begin with the prompt that asks for the answer",
                file=self._file,
                field="chat_template",
                remedy="Answers cannot be placed with this template: give samples without them.",
            )
        return prompt, whole.removeprefix(prompt).rstrip("\n")

    def _render(self, turns: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        rendered: str = self._renderer.apply_chat_template(
            list(turns),
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return rendered


def _turn(text: str, images: int) -> list[dict[str, Any]]:
    parts = [{"type": "image"}] * images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _read_template(folder: Path) -> tuple[str, Path]:
    """The template and its file: chat_template.jinja, else a field of one of the JSON files."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8"), jinja
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            template = content.get("chat_template") if isinstance(content, dict) else None
            if isinstance(template, str):
                return template, file
    raise ModelError(
        "holds no chat template",
        file=folder,
        remedy="Prompts need chat_template.jinja, or chat_template in tokenizer_config.json.",
    )
