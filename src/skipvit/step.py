"""The training step: normalise, forward, loss, backward, reduce, clip, update. One Cell, one graph.

What varies from step to step (learning rate, drop path, dropout seeds, random scores) comes with the batch, so the
graph holds no random state and no schedule, and a step is a function of its inputs and the parameters.
"""

import functools
from typing import NamedTuple

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, amp, nn, ops
from mindspore import dtype as mstype

from skipvit import runtime
from skipvit.config import Config, given_spans
from skipvit.optim import AdamW

# Dynamic loss scaling: halved at an overflow, doubled after so many steps without one (MindSpore's own defaults).
INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_FACTOR = 2
LOSS_SCALE_WINDOW = 2000
# More in a row end the run: by the 16th the scale has come down to 1, and there is nothing left to lower.
MAX_OVERFLOWS_IN_A_ROW = 30
LARGEST_FLOAT = float(np.finfo(np.float32).max)


class Sums(NamedTuple):
    """What the steps since the last look add up to."""

    loss: float  # of the steps that have one
    steps: int  # how many those are: all but those that overflowed in the forward pass
    overflows: int
    overflows_in_a_row: int  # up to the last step, also those before the last look


class Normalize(nn.Cell):
    """Bytes to the values the model takes: ``(B, 3, S, S)`` uint8 to float32, ``(x / 255 - mean) / std``.

    Done on the device: a batch of bytes is a quarter of the transfer.
    """

    def __init__(self, mean, std):
        super().__init__()
        std = np.asarray(std, np.float32).reshape(1, 3, 1, 1)
        mean = np.asarray(mean, np.float32).reshape(1, 3, 1, 1)
        self.scale = Tensor(1.0 / (255.0 * std))
        self.shift = Tensor(-mean / std)

    def construct(self, images):
        """See the class."""
        return images.astype(mstype.float32) * self.scale + self.shift


class Loss(nn.Cell):
    """Mean cross entropy of a batch against soft targets (mixed and smoothed ones are soft anyway)."""

    def __init__(self, net, normalize):
        super().__init__(auto_prefix=False)
        self.net, self.normalize = net, normalize
        self.log_softmax = ops.LogSoftmax(-1)

    def construct(self, images, targets, drop_path, dropout_seeds, scores, scale):
        """``scale *`` the loss of images ``(B, 3, S, S)`` uint8 and targets ``(B, C)``; a float32 scalar."""
        logits = self.net(self.normalize(images), drop_path, dropout_seeds, scores)
        return -(targets * self.log_softmax(logits)).sum(-1).mean() * scale


_scale = ops.MultitypeFuncGraph("scale_gradient")
_square_sum = ops.MultitypeFuncGraph("square_sum")
_accumulate = ops.MultitypeFuncGraph("accumulate")
_clear = ops.MultitypeFuncGraph("clear")


@_scale.register("Tensor", "Tensor")
def _scale_one(factor, gradient):
    return gradient * factor


@_square_sum.register("Tensor")
def _square_sum_one(gradient):
    return ops.square(gradient).sum()


@_accumulate.register("Tensor", "Tensor", "Tensor")
def _accumulate_one(share, total, gradient):
    return ops.assign_add(total, gradient * share)


@_clear.register("Tensor")
def _clear_one(total):
    return ops.assign(total, ops.zeros_like(total))


class TrainStep(nn.Cell):
    """One training step.

    Args:
        net: the model.
        config: ``optim`` (AdamW, clipping, accumulation, EMA), ``data.mean`` and ``data.std``, ``train.precision``.
        ranks: data-parallel processes. Their gradients are averaged before clipping.

    ``step(images, targets, rate, ...)`` returns the loss of this rank's batch, a float32 scalar. Every parameter of
    this Cell belongs to the state of a run: weights, moments, averages, accumulated gradients, loss scale, counters.
    """

    def __init__(self, net, config: Config, ranks=1):
        super().__init__(auto_prefix=False)
        optim = config.optim
        self.loss = Loss(net, Normalize(config.data.mean, config.data.std))
        self.weights = ParameterTuple(net.trainable_params())
        self.optimizer = AdamW(net.trainable_params(), optim)
        self.has_drop_path, self.has_dropout = config.model.drop_path > 0, config.model.dropout > 0
        self.has_scores = bool(given_spans(config))
        self.dropout_place = int(self.has_drop_path)  # of dropout's seeds in what comes with the batch
        self.loss_and_gradients = ops.value_and_grad(self.loss, None, self.weights)
        self.ranks = ranks
        if ranks > 1:
            self.average_over_ranks = nn.DistributedGradReducer(self.weights, True, ranks)
            self.sum_over_ranks = ops.AllReduce()
        self.clip_norm = optim.clip_norm
        self.hyper_map = ops.HyperMap()

        self.scales = runtime.resolve_precision(config.train.precision) == "fp16"
        self.scaler = amp.DynamicLossScaler(INITIAL_LOSS_SCALE, LOSS_SCALE_FACTOR, LOSS_SCALE_WINDOW)
        self.loss_scale = self.scaler.scale_value
        self.loss_scale.name, self.scaler.counter.name = "state.loss_scale", "state.loss_scale_counter"
        self.loss_scale_counter = self.scaler.counter
        self.one = Tensor(1.0, mstype.float32)

        # Steps since the last update, whether all of them were finite, and their gradients' sum.
        self.accumulate_steps = optim.accumulate_steps
        self.accumulated = self.weights.clone("accumulated", init="zeros") if self.accumulate_steps > 1 else ()
        self.waiting = _state(0, mstype.int32, "state.waiting")
        self.all_finite = _state(1, mstype.int32, "state.all_finite")
        # Sums for the log since it last set them to 0: a sink of many steps is looked at once.
        self.loss_sum = _state(0.0, mstype.float32, "state.loss_sum")
        self.overflows = _state(0, mstype.int32, "state.overflows")
        self.steps = _state(0, mstype.int32, "state.steps")
        if self.scales:
            self.overflows_in_a_row = _state(0, mstype.int32, "state.overflows_in_a_row")

    def compile(self, *inputs, **options):
        """As every Cell, but with the blocks compiled once, where the step has no branch on a value."""
        branches = self.scales or self.accumulate_steps > 1
        blocks = () if branches else self.loss.net.blocks
        runtime.compile_sharing(blocks, functools.partial(super().compile, *inputs, **options))

    def construct(self, images, targets, rate, *randomness):
        """One step.

        Args:
            images: ``(B, 3, S, S)`` uint8.
            targets: ``(B, C)`` float32, rows adding up to 1.
            rate: ``(1,)`` float32, the learning rate.
            *randomness: drop path's factors ``(depth, 2, B)``, dropout's seeds ``(1 + depth, 3)`` and the scores
                ``(G, B, N)`` of spans that are given theirs, those of them that the configuration uses.
        """
        drop_path = randomness[0] if self.has_drop_path else None
        seeds = randomness[self.dropout_place] if self.has_dropout else None
        scores = randomness[-1] if self.has_scores else None
        scale = self.loss_scale if self.scales else self.one
        loss, gradients = self.loss_and_gradients(images, targets, drop_path, seeds, scores, scale)
        loss = loss / scale

        # Before check_finite, which may double the loss scale: `scale` is the parameter itself, read where it is used.
        share = 1.0 / (scale * self.accumulate_steps)
        finite = self.check_finite(gradients) if self.scales else True
        if self.scales:
            # An overflow in the forward pass leaves no loss to count; the step is skipped.
            counts = ops.logical_or(finite, ops.abs(loss) <= LARGEST_FLOAT)
            ops.assign_add(self.loss_sum, ops.select(counts, loss, ops.zeros_like(loss)))
            ops.assign_add(self.steps, counts.astype(mstype.int32))
        else:
            ops.assign_add(self.loss_sum, loss)
            ops.assign_add(self.steps, 1)
        if self.accumulate_steps == 1:
            if finite:
                loss = ops.depend(loss, self.update(gradients, share, rate.reshape(())))
        else:
            if finite:
                add = ops.partial(_accumulate, share)
                loss = ops.depend(loss, self.hyper_map(add, self.accumulated, gradients))
            waiting = self.waiting + 1
            ops.assign(self.waiting, waiting)
            if waiting == self.accumulate_steps:
                # One step of them that overflowed spoils them all, as the update would be a biased mean.
                if self.all_finite > 0:
                    loss = ops.depend(loss, self.update(self.accumulated, self.one, rate.reshape(())))
                loss = ops.depend(loss, self.hyper_map(_clear, self.accumulated))
                ops.assign(self.waiting, 0)
                ops.assign(self.all_finite, 1)
        return loss

    def update(self, gradients, share, rate):
        """Mean over ranks, then clip to the global norm, then AdamW. ``share`` undoes the loss scale."""
        if self.ranks > 1:
            gradients = self.average_over_ranks(gradients)
        if self.clip_norm is not None:
            norm = ops.sqrt(ops.addn(self.hyper_map(_square_sum, gradients))) * share
            share = share * ops.minimum(self.clip_norm / (norm + 1e-6), self.one)  # as PyTorch's clip_grad_norm_
        if self.scales or self.clip_norm is not None:
            gradients = self.hyper_map(ops.partial(_scale, share), gradients)
        return self.optimizer(gradients, rate)

    def check_finite(self, gradients):
        """Whether no rank's gradients overflowed; the loss scale goes on accordingly, the same on every rank."""
        finite = amp.all_finite(gradients)
        if self.ranks > 1:
            finite = self.sum_over_ranks(finite.astype(mstype.float32).reshape(1))[0] > self.ranks - 0.5
        finite = ops.depend(finite, self.scaler.adjust(finite))
        ops.assign(self.all_finite, self.all_finite * finite.astype(mstype.int32))
        overflowed = 1 - finite.astype(mstype.int32)
        ops.assign_add(self.overflows, overflowed)
        ops.assign(self.overflows_in_a_row, (self.overflows_in_a_row + 1) * overflowed)
        return finite

    def read_sums(self) -> Sums:
        """The sums since the last call; they begin anew."""
        sums = Sums(
            loss=float(self.loss_sum.asnumpy()),
            steps=int(self.steps.asnumpy()),
            overflows=int(self.overflows.asnumpy()),
            overflows_in_a_row=int(self.overflows_in_a_row.asnumpy()) if self.scales else 0,
        )
        for parameter in (self.steps, self.loss_sum, self.overflows):
            # In place: set_data would part the parameter from what a graph with branches already holds of it.
            ops.assign(parameter, ops.zeros_like(parameter))
        return sums

    def read_loss_scale(self):
        """The loss scale as it stands."""
        return float(self.loss_scale.asnumpy())


def _state(value, dtype, name):
    return Parameter(Tensor(value, dtype), name=name, requires_grad=False)
