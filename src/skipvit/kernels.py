"""The same numbers by the form that each device does best.

On a CPU an elementwise operator costs as much as a tenth of the matrix products around it, and some of MindSpore's far
more: BiasAddGrad twenty times a product with a row of ones, LayerNorm and its gradient, sums over rows, the composed
gradients of softmax. One that broadcasts costs four times as much as one that does not, and keeps an index of eight
bytes for each element of each input for good; BiasAdd keeps none, but takes twice the time of an addition. Here all
that is written with matrix products and the fewest passes over the tokens, for the CPU; Ascend keeps the operators that
its compiler knows. Tests hold the two forms equal. (Figures: docs/LOG.md.)
"""

import contextlib
from collections.abc import Iterator

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from skipvit.runtime import on_cpu

LAYER_NORM_EPSILON = 1e-6  # timm's ViT
# Numbers, not calls of `math`: MindSpore 2.0.0 would compute those in the graph, as integers.
SQRT_HALF = 0.7071067811865476
LOG_SLOPE_OF_ERF = 0.12078223763524522  # at 0: log(2 / sqrt(pi))

_plain = False


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Models built within have the operators as they are on every device: what is exported may be served anywhere."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def _cpu_forms() -> bool:
    return on_cpu() and not _plain


def affine_kernel():
    """``(rows (R, I), weight (O, I), bias (O,)) -> (R, O)``: ``rows @ weight.T + bias``, all of one dtype."""
    return AffineCpu() if _cpu_forms() else Affine()


def layer_norm_kernel():
    """``(x (B, T, D), weight (D,), bias (D,)) -> (B, T, D)``: layer norm over the last axis, float32."""
    return LayerNormCpu() if _cpu_forms() else LayerNorm()


def attention_kernel():
    """``(query, key, value)``, each ``(B, H, T, d)``, to ``softmax(query @ key.T) @ value``; softmax in float32.

    The query comes scaled by ``d ** -0.5``.
    """
    return AttentionCpu() if _cpu_forms() else Attention()


def swap_kernel():
    """``(B, M, L, d) -> (B, L, M, d)``: tokens and heads change places."""
    return SwapCpu() if _cpu_forms() else Swap()


def scale_samples_kernel():
    """``(x (B, T, D), factors (B,)) -> (B, T, D)``: each sample times its factor."""
    return ScaleSamplesCpu() if _cpu_forms() else ScaleSamples()


class Affine(nn.Cell):
    """The operators as they are."""

    def __init__(self):
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd()

    def construct(self, rows, weight, bias):
        """See `affine_kernel`."""
        return self.bias_add(self.matmul(rows, weight), bias)


class AffineCpu(nn.Cell):
    """With the bias written out by a product, and its gradient as a row of ones times the output's gradient."""

    def __init__(self):
        super().__init__()
        self.plain = ops.MatMul()
        self.first_transposed = ops.MatMul(transpose_a=True)
        self.second_transposed = ops.MatMul(transpose_b=True)

    def construct(self, rows, weight, bias):
        """See `affine_kernel`."""
        ones = ops.ones((rows.shape[0], 1), rows.dtype)
        return self.second_transposed(rows, weight) + self.plain(ones, bias.reshape(1, -1))

    def bprop(self, rows, weight, bias, out, dout):
        """Gradients of rows, weight and bias."""
        ones = ops.ones((1, rows.shape[0]), dout.dtype)
        return (
            self.plain(dout, weight),
            self.first_transposed(dout, rows),
            self.plain(ones, dout).reshape(bias.shape),
        )


class LayerNorm(nn.Cell):
    """The operator as it is."""

    def __init__(self):
        super().__init__()
        self.normalize = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=LAYER_NORM_EPSILON)

    def construct(self, x, weight, bias):
        """See `layer_norm_kernel`."""
        return self.normalize(x, weight, bias)[0]


class LayerNormCpu(nn.Cell):
    """With the sums over rows and columns as matrix products.

    With ``h = (x - mean) / deviation`` and ``g = dy * weight`` the gradient of x is
    ``(g - mean(g) - h * mean(g * h)) / deviation``. All sums of ``g * h`` and ``dy * h`` come from ``dy * x``, and the
    rest is one multiple of x and one constant a row, so h itself is never made. Rows whose mean is many deviations lose
    digits of the gradient (at 50 deviations the fifth); a ViT's tokens are not like that.
    """

    def __init__(self):
        super().__init__()
        self.plain = ops.MatMul()
        self.first_transposed = ops.MatMul(transpose_a=True)

    def construct(self, x, weight, bias):
        """See `layer_norm_kernel`."""
        D = x.shape[-1]
        rows = x.reshape(-1, D)
        _, centred, inverse_deviation = self.statistics(rows)
        ones = ops.ones((rows.shape[0], 1), x.dtype)
        scaled = centred * self.plain(inverse_deviation, weight.reshape(1, D))
        return (scaled + self.plain(ones, bias.reshape(1, D))).reshape(x.shape)

    def statistics(self, rows):
        """Of ``(R, D)`` each row's mean ``(R, 1)``, the rows less it, and one by each row's deviation ``(R, 1)``."""
        D = rows.shape[1]
        column = ops.ones((D, 1), rows.dtype) * (1.0 / D)
        mean = self.plain(rows, column)
        # A row of ones times a column: the column written out, for nothing is to broadcast.
        centred = rows - self.plain(mean, ops.ones((1, D), rows.dtype))
        return mean, centred, ops.rsqrt(self.plain(centred * centred, column) + LAYER_NORM_EPSILON)

    def bprop(self, x, weight, bias, out, dout):
        """Gradients of x, weight and bias."""
        D = x.shape[-1]
        rows, gradient = x.reshape(-1, D), dout.reshape(-1, D)
        mean, _, inverse_deviation = self.statistics(rows)  # the forward pass's own: equal nodes are merged
        shift = mean * inverse_deviation
        column = weight.reshape(D, 1) * (1.0 / D)

        product = gradient * rows
        mean_g = self.plain(gradient, column)
        mean_gh = self.plain(product, column) * inverse_deviation - shift * mean_g
        of_rows = -inverse_deviation * inverse_deviation * mean_gh
        of_ones = -inverse_deviation * mean_g - of_rows * mean
        row = ops.ones((1, D), gradient.dtype)
        of_gradient = self.plain(inverse_deviation, weight.reshape(1, D))
        dx = gradient * of_gradient + rows * self.plain(of_rows, row) + self.plain(of_ones, row)

        ones = ops.ones((1, rows.shape[0]), gradient.dtype)
        dweight = self.first_transposed(inverse_deviation, product) - self.first_transposed(shift, gradient)
        return dx.reshape(x.shape), dweight.reshape(D), self.plain(ones, gradient).reshape(D)


class Attention(nn.Cell):
    """The operators as they are."""

    def __init__(self):
        super().__init__()
        self.plain = ops.BatchMatMul()
        self.first_transposed = ops.BatchMatMul(transpose_a=True)
        self.second_transposed = ops.BatchMatMul(transpose_b=True)
        self.softmax = ops.Softmax(-1)

    def construct(self, query, key, value):
        """See `attention_kernel`."""
        return self.plain(self.weights(query, key), value)

    def weights(self, query, key):
        """The softmax, ``(B, H, Q, T)``."""
        logits = self.second_transposed(query, key)
        return self.softmax(logits.astype(mstype.float32)).astype(query.dtype)


class AttentionCpu(Attention):
    """With the gradient of softmax in one pass over the ``(T, T)`` weights instead of four.

    Softmax's gradient needs each row's sum of weights times their gradients; that is also the sum, over d, of the
    output times its gradient, which is a third of the size (FlashAttention, arXiv 2205.14135, appendix B.4).
    """

    def __init__(self):
        super().__init__()
        self.sum_columns = ops.MatMul()

    def bprop(self, query, key, value, out, dout):
        """Gradients of query, key and value."""
        weights = self.weights(query, key)  # the forward pass's own: equal nodes are merged
        B, H, T, d = value.shape
        products = (dout * out).astype(mstype.float32).reshape(-1, d)  # float16 would lose the sum's digits
        sums = self.sum_columns(products, ops.ones((d, 1), mstype.float32))
        row_sums = sums.reshape(B, H, -1, 1).astype(out.dtype)
        # One more column of the product takes them off.
        ones = ops.ones((B, H, T, 1), value.dtype)
        dweights = self.second_transposed(ops.concat((dout, -row_sums), -1), ops.concat((value, ones), -1))
        dlogits = weights * dweights
        return (
            self.plain(dlogits, key),
            self.first_transposed(dlogits, query),
            self.first_transposed(weights, dout),
        )


class Swap(nn.Cell):
    """The operator as it is."""

    def construct(self, x):
        """See `swap_kernel`."""
        return x.transpose(0, 2, 1, 3)


class SwapCpu(Swap):
    """As a choice of rows of length d, for Transpose keeps an index of each element; so is its gradient."""

    def construct(self, x):
        """See `swap_kernel`."""
        B, M, L, d = x.shape
        places = np.arange(B * M * L, dtype=np.int32).reshape(B, M, L).swapaxes(1, 2)
        return ops.Gather()(x.reshape(B * M * L, d), Tensor(places.reshape(-1)), 0).reshape(B, L, M, d)

    def bprop(self, x, out, dout):
        """The gradient of x."""
        return (self.construct(dout),)


class ScaleSamples(nn.Cell):
    """The operators as they are."""

    def construct(self, x, factors):
        """See `scale_samples_kernel`."""
        return x * factors.reshape(-1, 1, 1)


class ScaleSamplesCpu(ScaleSamples):
    """With the factors written out by a product with ones."""

    def __init__(self):
        super().__init__()
        self.plain = ops.MatMul()

    def construct(self, x, factors):
        """See `scale_samples_kernel`."""
        B, T, D = x.shape
        return x * self.plain(factors.reshape(B, 1), ops.ones((1, T * D), x.dtype)).reshape(B, T, D)


class ExactGelu(nn.Cell):
    """Exact GELU (arXiv 1606.08415) but for two factors, elementwise: ``u * (1 + erf(u))``.

    ``gelu(x) = x * Phi(x)``, Phi the normal distribution's function, is ``SQRT_HALF`` times this of ``SQRT_HALF * x``.
    On every device with a gradient from the erf that is there already: three passes and six, where MindSpore's own
    takes about twice as many.
    """

    def construct(self, u):
        """``(...)`` to ``(...)``."""
        return u * (ops.erf(u) + 1.0)

    def bprop(self, u, out, dout):
        """``1 + erf(u) + u * 2 / sqrt(pi) * exp(-u**2)``, times the gradient that came."""
        return ((u * ops.exp(LOG_SLOPE_OF_ERF - u * u) + (ops.erf(u) + 1.0)) * dout,)
