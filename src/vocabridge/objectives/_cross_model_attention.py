"""Queries of the student's tokens, keys of the teacher's, and the attention between them (DSKD-CMA and its chunk form).

    queries Q_i = P_q [E(x_i); E(y_i)]            keys K_j = [E'(x'_j); E'(y'_j)] / sd

E, E' input embeddings (constants), x the token read and y the label at a supervised position, P_q a learned affine map,
sd one scalar standard deviation. With ``query_start: closed_form`` P_q starts as the orthogonal map between the two
embedding spaces fitted on tokens with identical bytes, on centred unit-length embeddings, for queries and keys alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vocabridge.alignment import shared_vocabulary
from vocabridge.errors import UserError
from vocabridge.losses.cross_attention import CrossAttention, Padding, position_distance, scalar_std
from vocabridge.losses.distances import distribution_report
from vocabridge.losses.procrustes import orthogonal_map, unit_centred
from vocabridge.models.forward import SideForward, SupervisedTokens, supervised_tokens
from vocabridge.objectives._dual_space import DualSpace, embed, scaled
from vocabridge.objectives.base import ObjectiveSetup
from vocabridge.objectives.config import CrossAttentionConfig
from vocabridge.pairs import PairBatch


@dataclass(frozen=True, slots=True, eq=False)
class QueryKeys:
    """Both sides of the attention of one micro-batch, packed over supervised positions.

    For a matching term over all positions, the others follow behind the supervised ones of all examples.
    """

    inputs: Tensor
    """``[N, 2d]`` constants that the queries are a linear map of."""
    queries: Tensor
    """``[N, 2D]``"""
    keys: Tensor
    """``[M, 2D]`` constants."""
    query_rows: Tensor
    """``[N]`` example of each query."""
    key_rows: Tensor
    """``[M]``"""
    num_examples: int


class CrossModelAttention(DualSpace):
    """Base of the methods that find a position's counterparts on the other side by attention over token embeddings."""

    config: CrossAttentionConfig
    student_center: Tensor
    teacher_center: Tensor

    def __init__(self, config: CrossAttentionConfig, setup: ObjectiveSetup):
        super().__init__(config, setup)
        assert setup.teacher_hidden_size is not None
        student_size, teacher_size = setup.student_hidden_size, setup.teacher_hidden_size
        self.query_projector = nn.Linear(2 * student_size, 2 * teacher_size)
        self.closed_form = config.query_start == "closed_form"
        self.score_scale = config.score_scale or (20.0 if self.closed_form else (2 * teacher_size) ** -0.5)
        if self.closed_form:
            self.register_buffer("student_center", torch.zeros(student_size))
            self.register_buffer("teacher_center", torch.zeros(teacher_size))
            self._start_closed_form(setup)

    @torch.no_grad()
    def _start_closed_form(self, setup: ObjectiveSetup) -> None:
        assert setup.teacher_tokenizer is not None
        assert setup.teacher_embedding is not None
        shared = shared_vocabulary(setup.student_tokenizer, setup.teacher_tokenizer)
        if len(shared.student_ids) < 2:
            method = type(self).__module__.rpartition(".")[2]
            raise UserError(
                f"objective {method}: the two vocabularies share no token, so query_start 'closed_form' has "
                "nothing to fit; use query_start: random."
            )
        student = embed(setup.student_embedding, torch.as_tensor(shared.student_ids))
        teacher = embed(setup.teacher_embedding, torch.as_tensor(shared.teacher_ids))
        self.student_center.copy_(student.mean(0))
        self.teacher_center.copy_(teacher.mean(0))
        rotation = orthogonal_map(
            unit_centred(student, student.mean(0)), unit_centred(teacher, teacher.mean(0)).to(student.device)
        )
        self.query_projector.weight.copy_(torch.block_diag(rotation, rotation))
        self.query_projector.bias.zero_()

    @torch.no_grad()
    def probe(self, batch: PairBatch, student_embedding: nn.Module, teacher_embedding: nn.Module) -> dict[str, float]:
        """Distances between queries and keys of a fixed batch."""
        return distances(self.probed(batch, student_embedding, teacher_embedding))

    def probed(self, batch: PairBatch, student_embedding: nn.Module, teacher_embedding: nn.Module) -> QueryKeys:
        """Queries and keys of a batch whose models have not been run."""
        return self.query_keys(
            supervised_tokens(batch["input_ids"], batch["labels"]),
            supervised_tokens(batch["teacher_input_ids"], batch["teacher_labels"]),
            student_embedding=student_embedding,
            teacher_embedding=teacher_embedding,
            num_examples=batch["input_ids"].shape[0],
        )

    def query_keys(
        self,
        student: SupervisedTokens,
        teacher: SupervisedTokens,
        *,
        student_embedding: nn.Module,
        teacher_embedding: nn.Module,
        num_examples: int,
    ) -> QueryKeys:
        """Queries and keys of the supervised positions of a micro-batch."""
        inputs = self.query_inputs(student, student_embedding, num_examples)
        keys = self.keys(teacher, teacher_embedding, num_examples)
        return QueryKeys(inputs, self.queries(inputs), keys, student.rows, teacher.rows, num_examples)

    def queries(self, inputs: Tensor) -> Tensor:
        """Query inputs ``[N, 2d]`` to queries ``[N, 2D]``; never in bfloat16 by autocast: the scores are scaled up."""
        with torch.autocast(inputs.device.type, enabled=False):
            return self.query_projector(inputs.to(self.query_projector.weight.dtype))

    def query_inputs(self, tokens: SupervisedTokens, embedding: nn.Module, num_examples: int) -> Tensor:
        """Constant ``[N, 2d]``: the student's embeddings of input token and label of each supervised position."""
        if self.closed_form:
            return _token_pairs(tokens, embedding, self.student_center)
        inputs = _token_pairs(tokens, embedding, None)
        if self.config.query_normalize == "none":
            return inputs
        return scaled(inputs, tokens.rows, num_examples, config=self.config)

    def keys(self, tokens: SupervisedTokens, embedding: nn.Module, num_examples: int) -> Tensor:
        """Constant ``[M, 2D]``: the teacher's embeddings of input token and label of each supervised position."""
        if self.closed_form:
            return _token_pairs(tokens, embedding, self.teacher_center)
        return scaled(_token_pairs(tokens, embedding, None), tokens.rows, num_examples, config=self.config)

    def with_unsupervised(
        self, sides: QueryKeys, student: SideForward, teacher: SideForward, *, batch: PairBatch
    ) -> QueryKeys:
        """The same with the positions of prompt and padding, which the published code all reads as token id 0, twice.

        Their keys are scaled as those of their example are, so that nothing else changes.
        """
        query_rows = _unsupervised_rows(sides.query_rows, batch["labels"])
        key_rows = _unsupervised_rows(sides.key_rows, batch["teacher_labels"])
        centers = (self.student_center, self.teacher_center) if self.closed_form else (None, None)
        is_scaled = self.config.query_normalize == "scalar"
        blank_inputs = self._blanks(student, sides.num_examples, center=centers[0], is_scaled=is_scaled)
        blank_keys = self._blanks(teacher, sides.num_examples, center=centers[1], is_scaled=not self.closed_form)
        inputs = torch.cat([sides.inputs, blank_inputs[query_rows]])
        return QueryKeys(
            inputs=inputs,
            queries=self.queries(inputs),
            keys=torch.cat([sides.keys, blank_keys[key_rows]]),
            query_rows=torch.cat([sides.query_rows, query_rows]),
            key_rows=torch.cat([sides.key_rows, key_rows]),
            num_examples=sides.num_examples,
        )

    def _blanks(self, side: SideForward, num_examples: int, *, center: Tensor | None, is_scaled: bool) -> Tensor:
        """``[B, 2F]``: token id 0 as input and label, as it looks in each example."""
        nothing = side.rows.new_zeros(num_examples)
        blanks = _token_pairs(SupervisedTokens(nothing, nothing, nothing), side.embedding, center)
        if not is_scaled:
            return blanks
        pairs = _token_pairs(side.tokens, side.embedding, center)
        rows = side.rows if self.config.statistics == "example" else None
        std = scalar_std(pairs, rows, num_examples).clamp(min=1e-6).expand(len(pairs), 1)
        return blanks / torch.ones_like(blanks[:, :1]).index_put((side.rows,), std)

    def attend(
        self, sides: QueryKeys, *, allowed: Tensor | None = None, position_weight: float = 0.0
    ) -> CrossAttention:
        """Attention within each example.

        Args:
            sides: queries and keys.
            allowed: ``[B, R_s, R_t]`` bool, which positions may see each other; default all of an example.
            position_weight: of the distance between relative positions, subtracted from the products before scaling.
        """
        student = Padding.of(sides.query_rows, sides.num_examples)
        teacher = Padding.of(sides.key_rows, sides.num_examples)
        queries, keys = sides.queries, sides.keys.to(sides.queries.dtype)
        with torch.autocast(queries.device.type, enabled=False):
            products = student.pad(queries) @ teacher.pad(keys).transpose(1, 2)
            if position_weight:
                products = products - position_weight * position_distance(student, teacher, dtype=products.dtype)
            return CrossAttention.of(products * self.score_scale, allowed, student=student, teacher=teacher)


def distances(sides: QueryKeys) -> dict[str, float]:
    """How far the distribution of the queries lies from that of the keys."""
    return distribution_report(
        sides.queries.float(), sides.keys.float(), x_groups=sides.query_rows, y_groups=sides.key_rows, seed=0
    )


def _token_pairs(tokens: SupervisedTokens, embedding: nn.Module, center: Tensor | None) -> Tensor:
    parts = [embed(embedding, tokens.input_ids), embed(embedding, tokens.labels)]
    if center is not None:
        parts = [unit_centred(part, center.to(part.dtype)) for part in parts]
    return torch.cat(parts, dim=-1)


def _unsupervised_rows(supervised_rows: Tensor, labels: Tensor) -> Tensor:
    """``[n]`` example of each position of the padded batch without a label, of L - 1; ``labels [B, L]`` unshifted."""
    num_examples, length = labels.shape
    counts = length - 1 - torch.bincount(supervised_rows, minlength=num_examples)
    return torch.arange(num_examples, device=counts.device).repeat_interleave(counts)
