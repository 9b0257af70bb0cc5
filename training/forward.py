"""The forward pass of training: transformers' modules, whole batches of equal pictures at once."""

from typing import Any

import torch
from torch.nn.functional import linear
from transformers import Qwen2VLForConditionalGeneration

from training.batches import IGNORE, IMAGE_TOKENS, SIDE_PATCHES, Batch


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _grid_positions() -> torch.Tensor:
    """Row and column of each patch in the processor's order, [P, 2]."""
    grid = torch.arange(SIDE_PATCHES)
    merged = torch.stack(torch.meshgrid(grid, grid, indexing="ij"))
    half = SIDE_PATCHES // 2
    return merged.view(2, half, 2, half, 2).permute(1, 3, 2, 4, 0).reshape(-1, 2)


def encode_pictures(visual: Any, patches: torch.Tensor) -> torch.Tensor:
    """The ViT on a batch of pictures of one size: [B, P, C*14*14] -> [B, IMAGE_TOKENS, hidden].

    transformers runs pictures one by one inside every attention; here they are a batch. Both
    frames of a still picture are equal, so the two halves of the patch filter are added.
    """
    filters = visual.patch_embed.proj.weight.sum(2).flatten(1)
    hidden = linear(patches, filters)
    cos, sin = visual.rotary_pos_emb(hidden, _grid_positions())
    batch, count, width = hidden.shape
    for block in visual.blocks:
        qkv = block.attn.qkv(block.norm1(hidden))
        heads = qkv.view(batch, count, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        query, key = (_rotate(x.float(), cos, sin).to(x.dtype) for x in (query, key))
        # Written out: on CPUs the fused kernel's backward is three times slower in bfloat16.
        scores = (query * block.attn.scaling) @ key.transpose(-1, -2)
        mixed = scores.float().softmax(-1).to(value.dtype) @ value
        hidden = hidden + block.attn.proj(mixed.transpose(1, 2).reshape(batch, count, width))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return torch.as_tensor(visual.merger(hidden)).view(batch, IMAGE_TOKENS, -1)


def label_logits(
    model: Qwen2VLForConditionalGeneration, batch: Batch, features: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of the positions that predict a label, float32 [N, vocab], row by row.

    features: what `encode_pictures` made of the batch's pictures, where it has any.
    """
    embeds = model.model.language_model.embed_tokens(batch.tokens)
    if features is not None:
        image = batch.tokens == model.config.image_token_id
        embeds = embeds.masked_scatter(image[..., None], features.to(embeds.dtype))
    mask = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, -1e9)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=batch.positions,
        attention_mask={"full_attention": mask},
        use_cache=False,
    ).last_hidden_state
    wanted = batch.labels[:, 1:] != IGNORE
    return torch.as_tensor(model.lm_head(hidden[:, :-1][wanted])).float()


def labels_of(batch: Batch) -> torch.Tensor:
    """The labels that `label_logits` predicts, int64 [N]."""
    labels = batch.labels[:, 1:]
    return labels[labels != IGNORE]
