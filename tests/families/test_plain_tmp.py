import torch, pytest
from marlin_tools.backends import load
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.quantize import QuantizeSettings, quantize


@torch.no_grad()
def test_plain(made, eager, tokens, model_type, tmp_path):
    source = Checkpoint.open(made(model_type))
    out = quantize(source, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    ids = tokens.sequences[0][None]
    ours = load(out, device="cpu", backend="reference")(input_ids=ids).logits
    theirs = eager(model_type, out.path)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
