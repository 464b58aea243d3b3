"""`NativeLinear` in the place of `nn.Linear`, on a CPU."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_tools import ops
from marlin_tools.backends.native import NativeLinear, NativeSparseLinear, build, join
from marlin_tools.quantized import ZERO, QuantizedLinear


def quantized(n=96, k=256, group_size=128):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.randn((n, k // group_size), generator=generator) * 0.02).to(torch.float16)
    return QuantizedLinear(codes, scales, group_size)


def model(bias=True, n=96, k=256):
    return nn.Sequential(nn.Sequential(nn.Linear(k, n, bias=bias)), nn.ReLU()).to(torch.float16)


def replace(network, weights, dtype=torch.float16):
    """Our linears in the place of those that `weights` names."""
    for name, weight in weights.items():
        linear = network.get_submodule(name)
        network.set_submodule(name, build(weight, linear.bias, linear.weight.device, dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(256,), (3, 256), (2, 3, 256), (0, 256)])
def test_same_as_a_linear_with_the_dequantized_weight(bias, shape):
    network, weight = model(bias), quantized()
    linear = network[0][0]
    linear.weight.data = weight.dequantize(torch.float16)
    x = torch.randn(shape).to(torch.float16)
    expected = network(x)

    replace(network, {"0.0": weight})

    assert isinstance(network[0][0], NativeLinear)
    assert network(x).shape == expected.shape
    assert torch.allclose(network(x), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("group_size", [32, 64])
def test_narrow_groups(group_size):
    network, weight, x = model(), quantized(group_size=group_size), torch.randn((3, 256)).to(torch.float16)
    replace(network, {"0.0": weight})

    assert network[0][0].weight.group_size == group_size
    exact = x.double() @ weight.dequantize(torch.float64).T + network[0][0].bias
    assert torch.allclose(network[0](x).double(), exact, atol=2e-3, rtol=2e-3)
    assert "group_size=" + str(group_size) in repr(network)


def test_sparse_weights_with_narrow_groups_run_on_the_dense_operator():
    weight = pruned()
    narrow = QuantizedLinear(weight.codes, weight.scales.repeat_interleave(2, dim=1), 64)
    network, same, x = model(n=128), model(n=128), torch.randn((3, 256)).to(torch.float16)
    same.load_state_dict(network.state_dict())
    replace(network, {"0.0": narrow})
    replace(same, {"0.0": weight})

    assert type(network[0][0]) is NativeLinear
    assert torch.allclose(network(x), same(x), atol=2e-3)


def pruned(n=128, k=256, seed=0):
    """2:4 sparse."""
    weight = quantized(n, k)
    quads = weight.codes.view(n, k // 4, 4).clone()
    quads.scatter_(2, torch.rand(quads.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=2)[..., :2], ZERO)
    return QuantizedLinear(quads.view(n, k), weight.scales, 128)


def test_sparse_weights_run_on_the_sparse_operator():
    network, weight, x = model(n=128), pruned(), torch.randn((3, 256)).to(torch.float16)
    replace(network, {"0.0": weight})

    assert type(network[0][0]) is NativeSparseLinear
    assert torch.equal(ops.unpack_sparse(network[0][0].weight).codes, weight.codes)
    exact = x.double() @ weight.dequantize(torch.float64).T + network[0][0].bias
    assert torch.allclose(network[0](x).double(), exact, atol=2e-3, rtol=2e-3)
    assert sum(buffer.nbytes for buffer in network.buffers()) == 128 * 256 * 3 // 8 + 128 * 2 * 2 + 128 * 2


def test_sparse_linears_are_joined_among_themselves():
    sparse = [build(pruned(64 * n, seed=n), None, torch.device("cpu"), torch.float16) for n in (1, 2, 3)]
    x = torch.randn((5, 256)).to(torch.float16)
    expected = torch.cat([linear(x) for linear in sparse], dim=1)

    whole = join(sparse)

    assert type(whole) is NativeSparseLinear
    assert torch.equal(whole(x), expected)
    assert torch.equal(torch.cat([linear(x) for linear in sparse], dim=1), expected)
    assert join([sparse[0], build(quantized(64), None, torch.device("cpu"), torch.float16)]) is None


def test_joined_linears_have_the_exponent_of_the_largest_scale():
    layers = [quantized(64), quantized(64), quantized(64)]
    layers[1].scales.fill_(3.0)
    linears = [build(layer, None, torch.device("cpu"), torch.float16) for layer in layers]

    whole = join(linears)

    together = QuantizedLinear(torch.cat([w.codes for w in layers]), torch.cat([w.scales for w in layers]), 128)
    assert whole.exponent == ops.pack(together).exponent > linears[0].exponent
    assert whole.weight.exponent == whole.exponent


def test_says_what_it_is():
    network = model()
    replace(network, {"0.0": quantized()})
    assert "in_features=256, out_features=96, group_size=128, bias=True" in repr(network)
    assert len(list(network.parameters())) == 0


@pytest.mark.gpu
def test_model_on_the_kernels_gives_the_logits_of_its_dequantized_weights():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
    )
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(config).to("cuda", torch.float16).eval()
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    weights = {}
    for name in names:
        linear = network.get_submodule(name)
        weights[name] = quantized(linear.out_features, linear.in_features).to("cuda")
        linear.weight.data = weights[name].dequantize(torch.float16)
    tokens = torch.randint(0, 512, (2, 40), device="cuda")
    with torch.inference_mode():
        expected = network(tokens).logits.float()
        replace(network, weights)
        logits = network(tokens).logits.float()
        text = network.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)

    assert (logits - expected).abs().max() < 1e-2 * expected.abs().max()
    assert text.shape == (2, 48)
    static = torch.zeros_like(tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        network(static)
        with torch.cuda.graph(graph):
            captured = network(static, use_cache=False).logits
        static.copy_(tokens)
        graph.replay()
    assert torch.equal(captured.float(), logits)


class Observation(TorchDispatchMode):
    """Notes the operators that pass through torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.parametrize("weight", [quantized(128), pruned(128)], ids=["dense", "sparse"])
def test_whoever_watches_still_sees_the_operator(weight):
    linear = build(weight, None, torch.device("cuda"), torch.float16)
    name = f"marlin_tools.{'w24a16' if weight.is_2_4() else 'w4a16'}_linear.default"
    x = torch.randn((3, 256), dtype=torch.float16, device="cuda")
    expected = linear(x)

    with Observation() as seen:
        assert torch.equal(linear(x), expected)
    assert name in seen.operators
    assert name in make_fx(linear)(x).code
    assert linear(x.clone().requires_grad_()).requires_grad  # torch refuses its backward; the kernel alone would end the graph
    with torch.no_grad():
        assert not linear(x.clone().requires_grad_()).requires_grad
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert linear(mode.from_tensor(x)).shape == (3, 128)


def test_one_compilation_serves_layers_with_other_scales():
    """As when blocks of a model are compiled one by one: whatever differs between them would be compiled for again."""
    layers = [
        NativeLinear(ops.pack(QuantizedLinear(torch.full((64, 128), 9, dtype=torch.uint8), scales, 128)))
        for scales in (torch.full((64, 1), scale, dtype=torch.float16) for scale in (0.002, 0.01, 0.06, 0.4))
    ]
    counter = CompileCounter()

    class Block(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + 1

    torch._dynamo.reset()
    compiled = torch.compile(Block.forward, backend=counter, fullgraph=True)
    for layer in layers:
        x = torch.randn((3, 128)).half()
        assert torch.equal(compiled(Block(layer), x), layer(x) + 1)
    assert counter.frame_count == 1
