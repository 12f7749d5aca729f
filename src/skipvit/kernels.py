"""The same numbers by the form that each device does best.

MindSpore's CPU kernels for two gradients take longer than the matrix products around them: BiasAddGrad, twenty times a
product with a row of ones, and LayerNormGrad. Here both are written as matrix products, for the CPU; Ascend keeps the
operators that its compiler knows. Tests hold the two forms equal. (Figures: docs/LOG.md.)
"""

from mindspore import nn, ops

from skipvit.runtime import on_cpu

LAYER_NORM_EPSILON = 1e-6  # timm's ViT


def affine_kernel():
    """``(rows (R, I), weight (O, I), bias (O,)) -> (R, O)``: ``rows @ weight.T + bias``, all of one dtype."""
    return AffineCpu() if on_cpu() else Affine()


def layer_norm_kernel():
    """``(x (B, T, D), weight (D,), bias (D,)) -> (B, T, D)``: layer norm over the last axis, float32."""
    return LayerNormCpu() if on_cpu() else LayerNorm()


class Affine(nn.Cell):
    """The operators as they are."""

    def __init__(self):
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd()

    def construct(self, rows, weight, bias):
        """See `affine_kernel`."""
        return self.bias_add(self.matmul(rows, weight), bias)


class AffineCpu(Affine):
    """With the bias's gradient as a row of ones times the output's gradient."""

    def __init__(self):
        super().__init__()
        self.plain = ops.MatMul()
        self.first_transposed = ops.MatMul(transpose_a=True)

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


class LayerNormCpu(LayerNorm):
    """With the gradient's sums over rows and columns as matrix products.

    With ``h = (x - mean) / deviation`` and ``g = dy * weight`` the gradient of x is
    ``(g - mean(g) - h * mean(g * h)) / deviation``. All sums of ``g * h`` and ``dy * h`` come from ``dy * x``, and the
    rest is one multiple of x and one constant a row, so h itself is never made: five passes over the tokens.
    """

    def __init__(self):
        super().__init__()
        self.plain = ops.MatMul()
        self.first_transposed = ops.MatMul(transpose_a=True)

    def bprop(self, x, weight, bias, out, dout):
        """Gradients of x, weight and bias."""
        D = x.shape[-1]
        _, mean, variance = self.normalize(x, weight, bias)
        rows, gradient = x.reshape(-1, D), dout.reshape(-1, D)
        mean = mean.reshape(-1, 1)
        inverse_deviation = ops.rsqrt(variance.reshape(-1, 1) + LAYER_NORM_EPSILON)
        shift = mean * inverse_deviation
        column = weight.reshape(D, 1) * (1.0 / D)

        product = gradient * rows
        mean_g = self.plain(gradient, column)
        mean_gh = self.plain(product, column) * inverse_deviation - shift * mean_g
        of_rows = -inverse_deviation * inverse_deviation * mean_gh
        of_ones = -inverse_deviation * mean_g - of_rows * mean
        dx = gradient * weight * inverse_deviation + rows * of_rows + of_ones

        ones = ops.ones((1, rows.shape[0]), gradient.dtype)
        dweight = self.first_transposed(inverse_deviation, product) - self.first_transposed(shift, gradient)
        return dx.reshape(x.shape), dweight.reshape(D), self.plain(ones, gradient).reshape(D)
