# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What stands between the towers and the losses: projection heads, view fusion, text-informed pooling of views."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_fake_tensor

from .configuration_t3d import T3DConfig
from .encoders_t3d import eager_attention_forward

# Where a volume's global view stands among its local views: the centre of the body box, and all of it.
_GLOBAL_VIEW_POSITION = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)


def unit_norm(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1 along the last axis, in float32 or finer: half precision would show in the logits."""
    return nn.functional.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def masked_mean(vectors: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the second axis of `(batch, items, channels)` where `mask`, `(batch, items)`, is not 0."""
    if mask is None:
        return vectors.mean(dim=1)
    weights = mask[..., None].to(vectors)
    return (vectors * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def has_content(tensor: torch.Tensor) -> bool:
    """Whether values can be read of a tensor: a forecast of memory runs on some that have none."""
    return not is_fake_tensor(tensor) or torch.compiler.is_compiling()


def groups_of_like_length(attention_mask: torch.Tensor, num_groups: int) -> list[tuple[torch.Tensor, int]]:
    """
    Texts in groups that pad little: which texts, and how many leading tokens hold all of theirs.

    Args:
        attention_mask (`torch.Tensor` of shape `(texts, tokens)`): 0 for padding.
        num_groups (`int`): exactly as many, of equal size where it divides the texts; where these are fewer, the
            longest is repeated at the end.
    """
    places = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    lengths = ((attention_mask != 0) * places).amax(dim=1).clamp(min=1)
    order = lengths.argsort(stable=True)
    if len(order) < num_groups:
        order = torch.cat([order, order[-1:].expand(num_groups - len(order))])
    groups = order.tensor_split(num_groups)
    widths = lengths[torch.stack([members[-1] for members in groups])].tolist()
    return list(zip(groups, widths, strict=True))


class T3DProjectionHead(nn.Module):
    """`Linear -> norm -> ReLU -> Linear` into the joint space, on vectors or on token sequences."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int, norm: str = "layer"):
        super().__init__()
        self.input_projection = nn.Linear(input_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size) if norm == "layer" else nn.BatchNorm1d(hidden_size)
        self.output_projection = nn.Linear(hidden_size, output_size)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        `(..., input_size)` to `(..., output_size)`. A batch norm takes its statistics over all leading axes, without
        what the mask, of their shape, leaves out: padding would change what is not padded.
        """
        hidden_states = self.input_projection(hidden_states)
        vectors = hidden_states.reshape(-1, hidden_states.shape[-1])
        kept = None if mask is None else self._kept(mask.flatten())
        if kept is None:
            vectors = self.norm(vectors)
        else:
            vectors = vectors.index_put((kept,), self.norm(vectors[kept]))
        return self.output_projection(nn.functional.relu(vectors.view_as(hidden_states)))

    def _kept(self, mask: torch.Tensor) -> torch.Tensor | None:
        """Which vectors a batch norm in training takes its statistics over; `None` for all of them."""
        if not isinstance(self.norm, _BatchNorm) or not self.norm.training or not has_content(mask):
            return None
        kept = mask.nonzero().squeeze(1)
        # One vector has no statistics of its own.
        return kept if 1 < len(kept) < len(mask) else None


class T3DViewFusionLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer over the views of a volume."""

    def __init__(self, config: T3DConfig):
        super().__init__()
        hidden_size = config.vision_config.hidden_size
        self.config = config
        self.head_dim = hidden_size // config.num_fusion_heads
        self.is_causal = False
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_projection = nn.Linear(hidden_size, hidden_size)
        self.key_projection = nn.Linear(hidden_size, hidden_size)
        self.value_projection = nn.Linear(hidden_size, hidden_size)
        self.output_projection = nn.Linear(hidden_size, hidden_size)
        # As wide as the tokens, not four times: with 2048 channels these layers would outweigh the encoder.
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        self.feed_forward_input = nn.Linear(hidden_size, hidden_size)
        self.feed_forward_output = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(batch, views, hidden_size)` to the same shape; the mask, `(batch, 1, 1, views)`, is added to scores."""
        normed = self.attention_norm(hidden_states)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query_projection, self.key_projection, self.value_projection)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attention(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0)
        hidden_states = hidden_states + self.output_projection(mixed.flatten(2))
        normed = self.feed_forward_norm(hidden_states)
        return hidden_states + self.feed_forward_output(nn.functional.gelu(self.feed_forward_input(normed)))


class T3DViewFusion(nn.Module):
    """A small transformer over the global view and the valid local views; it puts out the global view's token."""

    def __init__(self, config: T3DConfig):
        super().__init__()
        self.position_projection = nn.Linear(len(_GLOBAL_VIEW_POSITION), config.vision_config.hidden_size)
        self.layers = nn.ModuleList(T3DViewFusionLayer(config) for _ in range(config.num_fusion_layers))

    def forward(
        self,
        global_features: torch.Tensor,
        local_features: torch.Tensor,
        local_mask: torch.Tensor,
        local_positions: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            global_features (`torch.Tensor` of shape `(batch, hidden_size)`): the pooled global view.
            local_features (`torch.Tensor` of shape `(batch, views, hidden_size)`): pooled local views.
            local_mask (`torch.BoolTensor` of shape `(batch, views)`): views that exist.
            local_positions (`torch.Tensor` of shape `(batch, views, 6)`): their centres and extents.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        global_position = global_features.new_tensor(_GLOBAL_VIEW_POSITION).expand(len(global_features), 1, -1)
        local_positions = local_positions.masked_fill(~local_mask[..., None], 0.0).to(global_features.dtype)
        tokens = torch.cat([global_features[:, None], local_features], dim=1)
        tokens = tokens + self.position_projection(torch.cat([global_position, local_positions], dim=1))
        is_view = nn.functional.pad(local_mask, (1, 0), value=True)
        attention_mask = torch.zeros_like(is_view, dtype=tokens.dtype)
        attention_mask = attention_mask.masked_fill(~is_view, torch.finfo(tokens.dtype).min)[:, None, None]
        for layer in self.layers:
            tokens = layer(tokens, attention_mask)
        return tokens[:, 0]


class T3DReports(NamedTuple):
    """
    The reports of this rank as the multi-view alignment uses them.

    Args:
        embeds (`torch.Tensor` of shape `(pairs, size)`): projected, un-normalised.
        tokens (`torch.Tensor` of shape `(pairs, report_tokens, size)`, *optional*): projected; `tma_query="vision"`.
        mask (`torch.BoolTensor` of shape `(pairs, report_tokens)`, *optional*): `False` for padding.
    """

    embeds: torch.Tensor
    tokens: Any = None
    mask: Any = None


class T3DMultiViewAlignment(nn.Module):
    """
    Text-informed pooling of local views: what asks (`tma_query`) attends to a view's tokens, and a head turns what it
    reads into the view's vector.
    """

    def __init__(self, config: T3DConfig):
        super().__init__()
        size = config.projection_dim
        self.config = config
        self.head_dim = size // config.num_tma_heads
        self.query_projection = nn.Linear(size, size)
        self.key_projection = nn.Linear(size, size)
        self.value_projection = nn.Linear(size, size)
        self.output_projection = nn.Linear(size, size)
        # Never a batch norm: vectors are pooled in chunks of queries, and the result must not depend on the chunk.
        self.head = T3DProjectionHead(size, config.projection_hidden_size, size)
        if config.tma_query == "none":
            self.learned_query = nn.Embedding(1, size)

    def split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., tokens, size)` to `(..., heads, tokens, head_dim)`."""
        return hidden_states.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)

    def key_and_value(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each `(..., heads, tokens, head_dim)`, of projected tokens `(..., tokens, size)`."""
        return self.split_heads(self.key_projection(tokens)), self.split_heads(self.value_projection(tokens))

    def learned_queries(self, device: torch.device) -> torch.Tensor:
        """The one query of `tma_query="none"`, `(1, size)`."""
        return self.learned_query(torch.zeros(1, dtype=torch.int64, device=device))

    def read_out(self, mixed: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Attended values `(..., size)` to unit-norm view vectors `(..., size)`."""
        hidden_states = self.output_projection(mixed)
        return unit_norm(self.head(hidden_states if residual is None else residual + hidden_states))

    def pool_by_queries(self, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """
        The query asks, the view answers.

        Args:
            queries (`torch.Tensor` of shape `(1 or views, queries, size)`): shared by all views, or each view's own.
            key, value (`torch.Tensor` of shape `(views, heads, tokens, head_dim)`): of the views' projected tokens.

        Returns:
            `torch.Tensor` of shape `(queries, views, size)`, of unit norm.
        """
        query = self.split_heads(self.query_projection(queries)).expand(len(key), -1, -1, -1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.read_out(mixed.permute(2, 0, 1, 3).flatten(2))

    def pool_by_views(
        self, tokens: torch.Tensor, report_tokens: torch.Tensor, report_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        The view's tokens attend to the report's; the visual residual is kept, the text branch detached.

        Args:
            tokens (`torch.Tensor` of shape `(1 or reports, views, tokens, size)`): shared, or each report's own views.
            report_tokens (`torch.Tensor` of shape `(reports, report_tokens, size)`): projected.
            report_mask (`torch.BoolTensor` of shape `(reports, report_tokens)`): `False` for padding.

        Returns:
            `torch.Tensor` of shape `(reports, views, size)`, of unit norm.
        """
        report_tokens = report_tokens.detach()
        query = self.split_heads(self.query_projection(tokens.flatten(1, 2))).expand(len(report_tokens), -1, -1, -1)
        key, value = self.key_and_value(report_tokens)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=report_mask[:, None, None])
        # (reports, heads, views * tokens, head_dim) -> mean over tokens; the output projection commutes with it
        mixed = mixed.unflatten(2, tokens.shape[1:3]).mean(dim=3).transpose(1, 2).flatten(2)
        return self.read_out(mixed, residual=tokens.mean(dim=2))

    def pool_own_views(self, tokens: torch.Tensor, reports: T3DReports) -> torch.Tensor:
        """Each view as its own pair's report asks: `(pairs, views, tokens, size)` to `(pairs, views, size)`."""
        if self.config.tma_query == "vision":
            return self.pool_by_views(tokens, reports.tokens, reports.mask)
        if self.config.tma_query == "none":
            queries = self.learned_queries(tokens.device)[None]
        else:
            queries = reports.embeds.repeat_interleave(tokens.shape[1], dim=0)[:, None]
        views = self.pool_by_queries(queries, *self.key_and_value(tokens.flatten(0, 1)))
        return views[0].unflatten(0, tokens.shape[:2])

    def pooler(
        self, tokens: torch.Tensor, reports: T3DReports, candidates: torch.Tensor | None = None
    ) -> tuple[Callable[[int, int], torch.Tensor], int]:
        """
        Pooling of every candidate view as each report asks, a chunk of reports at a time.

        Args:
            tokens (`torch.Tensor` of shape `(pairs, views, tokens, size)`): projected, of all ranks.
            reports (`T3DReports`): of this rank.
            candidates (`torch.LongTensor` of shape `(reports, candidates)`, *optional*): pairs that each report asks;
                all by default.

        Returns:
            The function from `(start, stop)` to views `(stop - start, candidates, views, size)`, and about how many
            numbers one report makes it hold at once.
        """
        num_pairs, num_views, num_tokens, size = tokens.shape
        num_candidates = num_pairs if candidates is None else candidates.shape[1]
        by_views = self.config.tma_query == "vision"
        if not by_views:
            key, value = self.key_and_value(tokens.flatten(0, 1))

        def pool(start: int, stop: int) -> torch.Tensor:
            chosen = None if candidates is None else candidates[start:stop]
            if by_views:
                asked = tokens.flatten(0, 1)[None] if chosen is None else tokens[chosen].flatten(1, 2)
                views = self.pool_by_views(asked, reports.tokens[start:stop], reports.mask[start:stop])
            elif chosen is None:
                views = self.pool_by_queries(reports.embeds[None, start:stop], key, value)
            else:
                chosen_key, chosen_value = (
                    part.unflatten(0, (num_pairs, num_views))[chosen].flatten(0, 2) for part in (key, value)
                )
                queries = reports.embeds[start:stop].repeat_interleave(num_candidates * num_views, dim=0)
                views = self.pool_by_queries(queries[:, None], chosen_key, chosen_value)
            return views.view(stop - start, num_candidates, num_views, size)

        size_per_view = 4 * size + 2 * self.head.input_projection.out_features + self.config.num_tma_heads * num_tokens
        if by_views or candidates is not None:
            size_per_view += 3 * num_tokens * size
        return pool, size_per_view * num_candidates * num_views

    def attention_map(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """
        Where each query looks, mean over heads.

        Args:
            queries (`torch.Tensor` of shape `(batch, size)`), tokens (`torch.Tensor` of shape
            `(batch, views, tokens, size)`): each batch entry's query is asked of its own views.

        Returns:
            `torch.Tensor` of shape `(batch, views, tokens)` whose last axis sums to 1.
        """
        query = self.split_heads(self.query_projection(queries)[:, None, None])
        key = self.split_heads(self.key_projection(tokens))
        scores = (query @ key.transpose(-1, -2)).squeeze(-2) * self.head_dim**-0.5
        return scores.softmax(dim=-1, dtype=torch.float32).mean(dim=-2)


class T3DPrototypes(nn.Module):
    """
    Unit-norm prototypes of the clusters that views fall into. They hold still for the first
    `num_frozen_prototype_batches` training batches: assignments to directions that have not settled would drag them to
    where all views are.
    """

    def __init__(self, config: T3DConfig):
        super().__init__()
        self.num_frozen_batches = config.num_frozen_prototype_batches
        self.directions = nn.Embedding(config.num_prototypes, config.projection_dim)
        # In the state, so that a resumed run and a loaded model go on where they stood.
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    def forward(self, device: torch.device) -> torch.Tensor:
        """`(num_prototypes, projection_dim)`, normalised here: their lengths mean nothing."""
        indices = torch.arange(self.directions.num_embeddings, device=device)
        prototypes = unit_norm(self.directions(indices))
        if self.training and torch.is_grad_enabled():
            # A gradient of 0, not none: data-parallel training waits for every parameter's.
            prototypes = torch.where(self.num_batches < self.num_frozen_batches, prototypes.detach(), prototypes)
            self.num_batches += 1
        return prototypes


__all__ = ["T3DMultiViewAlignment", "T3DProjectionHead", "T3DPrototypes", "T3DReports", "T3DViewFusion", "unit_norm"]
