"""AdamW, its learning rate, and the moving average of the weights.

The optimizer is one fused kernel a parameter (``ops.Adam``), which both releases and the 910A have; decoupled decay is
one multiplication before it. Parity with PyTorch's AdamW is tested.
"""

import math

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from skipvit.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps_per_epoch: int, epochs: int, images_an_update: int) -> float:
    """The rate of one step: linear warm-up, then half a cosine (DeiT).

    Args:
        optim: the rates and the warm-up's length.
        step: counted from 0 over the whole run.
        steps_per_epoch: steps an epoch.
        epochs: what the schedule spans.
        images_an_update: over all ranks and accumulated steps; scales the rates where ``reference_batch_size`` is set.
    """
    scale = images_an_update / optim.reference_batch_size if optim.reference_batch_size else 1.0
    warmup_steps = optim.warmup_epochs * steps_per_epoch
    total_steps = epochs * steps_per_epoch
    if step < warmup_steps:
        start, share = optim.warmup_learning_rate, step / warmup_steps
        return scale * (start + (optim.learning_rate - start) * share)
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    low = optim.min_learning_rate
    return scale * (low + (optim.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def decays(parameter) -> bool:
    """Weight decay is for the matrices: not for norms, biases, CLS token and position embedding (DeiT)."""
    return len(parameter.shape) > 1 and parameter.name not in ("cls_token", "pos_embed")


_update = ops.MultitypeFuncGraph("adamw_update")
_average = ops.MultitypeFuncGraph("ema_update")
_adam = ops.Adam()


@_update.register(*["Tensor"] * 11, "Bool")
def _update_one(power1, power2, beta1, beta2, epsilon, rate, shrink, weight, moment1, moment2, gradient, decayed):
    if decayed:
        ops.assign(weight, weight * shrink)
    return _adam(weight, moment1, moment2, power1, power2, rate, beta1, beta2, epsilon, gradient)


@_average.register("Tensor", "Tensor", "Tensor")
def _average_one(decay, average, weight):
    return ops.assign(average, average * decay + weight * (1.0 - decay))


class AdamW(nn.Cell):
    """AdamW (arXiv 1711.05101) as PyTorch computes it, and the moving average of the weights where it is on.

    Its state lies in parameters called ``adam_m.<name>``, ``adam_v.<name>``, ``ema.<name>``, ``optimizer.updates`` and
    ``optimizer.beta1_power``, ``optimizer.beta2_power``, so that a checkpoint holds all of it.

    Args:
        weights: the model's trainable parameters.
        optim: betas, epsilon, decay.
    """

    def __init__(self, weights, optim: OptimConfig):
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(weights)
        self.moment1 = self.weights.clone("adam_m", init="zeros")
        self.moment2 = self.weights.clone("adam_v", init="zeros")
        self.beta1_power = Parameter(Tensor(1.0, mstype.float32), name="optimizer.beta1_power", requires_grad=False)
        self.beta2_power = Parameter(Tensor(1.0, mstype.float32), name="optimizer.beta2_power", requires_grad=False)
        self.updates = Parameter(Tensor(0, mstype.int32), name="optimizer.updates", requires_grad=False)
        self.beta1 = Tensor(optim.beta1, mstype.float32)
        self.beta2 = Tensor(optim.beta2, mstype.float32)
        self.epsilon, self.weight_decay, self.ema_decay = optim.epsilon, optim.weight_decay, optim.ema_decay
        self.decayed = tuple(decays(weight) for weight in weights)
        self.averages = self.weights.clone("ema", init="same") if optim.ema_decay else ()
        self.hyper_map = ops.HyperMap()

    def construct(self, gradients, rate):
        """Update the weights by ``gradients`` (one a weight, float32) at the learning rate ``rate`` (a scalar)."""
        power1 = self.beta1_power * self.beta1
        power2 = self.beta2_power * self.beta2
        ops.assign(self.beta1_power, power1)
        ops.assign(self.beta2_power, power2)
        updates = self.updates + 1
        ops.assign(self.updates, updates)
        # ops.Adam adds epsilon before the second moment's bias is corrected; scaled so, it is PyTorch's epsilon.
        epsilon = self.epsilon * ops.sqrt(1.0 - power2)
        shrink = 1.0 - rate * self.weight_decay
        update = ops.partial(_update, power1, power2, self.beta1, self.beta2, epsilon, rate, shrink)
        done = self.hyper_map(update, self.weights, self.moment1, self.moment2, gradients, self.decayed)
        if self.ema_decay > 0:
            # The average is short at first, or the random initial weights would stay in it for long (TensorFlow's
            # ExponentialMovingAverage with num_updates).
            count = updates.astype(mstype.float32)
            decay = ops.minimum((1.0 + count) / (10.0 + count), Tensor(self.ema_decay, mstype.float32))
            weights = ops.depend(self.weights, done)
            done = self.hyper_map(ops.partial(_average, decay), self.averages, weights)
        return done
