"""The two forms of each kernel give the same numbers and the same gradients; GELU is exact."""

import math

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from skipvit import kernels

GENERATOR = np.random.default_rng(0)


def draw(*shape):
    return GENERATOR.standard_normal(shape).astype(np.float32)


# Axes that meet differ in length. The layer norm's rows have means and deviations of their own.
CASES = {
    "affine": (kernels.Affine, kernels.AffineCpu, [draw(15, 7), draw(11, 7), draw(11)]),
    "layer_norm": (
        kernels.LayerNorm,
        kernels.LayerNormCpu,
        [(draw(3, 5, 14) + draw(3, 5, 1)) * np.exp(draw(3, 5, 1)), draw(14), draw(14)],
    ),
    "attention": (kernels.Attention, kernels.AttentionCpu, [draw(2, 3, 9, 4), draw(2, 3, 9, 4), draw(2, 3, 9, 4)]),
    "attention_of_one_query": (
        kernels.Attention,
        kernels.AttentionCpu,
        [draw(2, 3, 1, 4), draw(2, 3, 9, 4), draw(2, 3, 9, 4)],
    ),
    "swap": (kernels.Swap, kernels.SwapCpu, [draw(2, 3, 5, 7)]),
    "scale_samples": (kernels.ScaleSamples, kernels.ScaleSamplesCpu, [draw(3, 5, 7), draw(3)]),
}

pytestmark = pytest.mark.usefixtures("graph_mode")


class Gradients(nn.Cell):
    """A kernel's output and the gradients of all its inputs."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, sensitivity, *inputs):
        return self.gradient(self.kernel)(*inputs, sensitivity)


def run(kernel, inputs, sensitivity):
    tensors = [Tensor(value) for value in inputs]
    gradients = Gradients(kernel)(Tensor(sensitivity), *tensors)
    return kernel(*tensors).asnumpy(), [gradient.asnumpy() for gradient in gradients]


@pytest.mark.parametrize("case", CASES)
def test_both_forms_are_one_function(case):
    plain, cpu, inputs = CASES[case]
    sensitivity = draw(*plain()(*(Tensor(value) for value in inputs)).shape)
    wanted, wanted_gradients = run(plain(), inputs, sensitivity)
    output, gradients = run(cpu(), inputs, sensitivity)
    # Only the layer norm's sums are made in another order; how near it is to float64 is tested below.
    np.testing.assert_allclose(output, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max() if case == "layer_norm" else 0)
    assert len(gradients) == len(inputs)
    for gradient, of_plain in zip(gradients, wanted_gradients):
        # Against float64 LayerNormGrad of MindSpore 2.0.0 is off by 1.4e-5 of the largest, the CPU form by 2e-7.
        share = 3e-5 if case == "layer_norm" else 3e-6
        np.testing.assert_allclose(gradient, of_plain, rtol=0, atol=share * np.abs(of_plain).max())


@pytest.mark.parametrize("mean", [0.0, 3.0, 50.0])
def test_layer_norm_on_cpu_is_as_near_to_float64_as_the_rows_are(mean):
    x, weight, bias = draw(31, 2, 96) + np.float32(mean), draw(96), draw(96)
    exact = x.astype(np.float64)
    variance = exact.var(-1, keepdims=True) + kernels.LAYER_NORM_EPSILON
    wanted = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(variance) * weight + bias
    output = kernels.LayerNormCpu()(*(Tensor(value) for value in (x, weight, bias))).asnumpy()
    # A mean is rounded to a float32's 24 bits, in units of its size, and a few of its sum's.
    np.testing.assert_allclose(output, wanted, rtol=0, atol=(1 + mean) * 3e-7 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["affine", "layer_norm", "attention", "swap", "scale_samples"])
def test_each_device_has_its_form(name, monkeypatch):
    for on_cpu, wanted in zip((False, True), CASES[name]):
        monkeypatch.setattr(kernels, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        assert type(getattr(kernels, f"{name}_kernel")()) is wanted
        with kernels.plain_operators():
            assert type(getattr(kernels, f"{name}_kernel")()) is CASES[name][0]


def test_exact_gelu_and_its_gradient():
    x = np.concatenate([np.linspace(-9, 9, 181), [-60.0, 0.0, 60.0]]).astype(np.float32)
    phi = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x.astype(np.float64)])
    density = np.exp(-0.5 * x.astype(np.float64) ** 2) / math.sqrt(2 * math.pi)
    output, (gradient,) = run(kernels.ExactGelu(), [x * np.float32(kernels.SQRT_HALF)], np.full_like(x, 0.5))
    np.testing.assert_allclose(output * kernels.SQRT_HALF, x * phi, rtol=0, atol=2e-6)
    np.testing.assert_allclose(gradient, phi + x * density, rtol=0, atol=2e-6)
