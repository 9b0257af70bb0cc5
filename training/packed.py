"""Runs and scores packed batches: many questions at once, where only figures are wanted."""

import torch
from transformers import Qwen2VLForConditionalGeneration

from training.assets import draw_pictures
from training.batches import Batch, Sampler
from training.forward import encode_pictures, label_logits, labels_of
from training.score import Score


def run_batches(model: Qwen2VLForConditionalGeneration, batches: list[Batch]) -> list[torch.Tensor]:
    """Logits at the labels of each batch, in the model's own precision."""
    logits = []
    with torch.no_grad():
        for batch in batches:
            features = None
            if batch.patches is not None:
                features = encode_pictures(model.model.visual, batch.patches)
            logits.append(label_logits(model, batch, features))
    return logits


def picture_batches(sampler: Sampler, seed: int, count: int) -> list[Batch]:
    """The pictures of a seed with their questions, 16 to a batch."""
    pictures = draw_pictures(seed, count)
    parts = [pictures[i : i + 16] for i in range(0, count, 16)]
    return [
        sampler.pack([p.scene for p in part], [p.pixels for p in part], [p.questions for p in part])
        for part in parts
    ]


def packed_score(logits: list[torch.Tensor], batches: list[Batch], end: int) -> Score:
    """`score` on packed batches: an answer is a run of labels up to the token `end`."""
    right, count, log_probability, margin = 0, 0, 0.0, 0.0
    for rows, batch in zip(logits, batches, strict=True):
        labels = labels_of(batch)
        wanted = labels[:, None]
        chosen = rows.gather(1, wanted)
        margins = chosen - rows.scatter(1, wanted, -torch.inf).amax(1, keepdim=True)
        ends = (labels == end).nonzero().flatten() + 1
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        least = torch.stack([part.min() for part in torch.split(margins[:, 0], sizes)])
        right += int((least > 0).sum())
        count += len(sizes)
        margin += float(least.sum())
        log_probability += float(rows.log_softmax(1).gather(1, wanted).sum())
    return Score(count, right / count, log_probability / count, margin / count)
