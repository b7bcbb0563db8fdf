import pytest
import torch
from torch.nn import functional as F

from mae_core.checkpoint import CheckpointError
from mae_core.dalle import DalleTokenizer, read_dalle
from mae_core.data import MEAN, STD
from mae_core.errors import UserError

WIDTH, TOKENS = 8, 40


def state_dict():
    """Random weights under the names of openai/DALL-E, dall_e/encoder.py, written out by hand, in a small width."""
    torch.manual_seed(0)
    shapes, n_in = {"blocks.input": (WIDTH, 3, 7)}, WIDTH
    for group, n_out in ((1, WIDTH), (2, 2 * WIDTH), (3, 4 * WIDTH), (4, 8 * WIDTH)):
        for block in (1, 2):
            start, inner = f"blocks.group_{group}.block_{block}", n_out // 4
            if n_in != n_out:
                shapes[f"{start}.id_path"] = (n_out, n_in, 1)
            sides = [(inner, n_in, 3), (inner, inner, 3), (inner, inner, 3), (n_out, inner, 1)]
            shapes |= {f"{start}.res_path.conv_{i + 1}": shape for i, shape in enumerate(sides)}
            n_in = n_out
    shapes["blocks.output.conv"] = (TOKENS, n_in, 1)
    state = {}
    for name, (n_out, width, side) in shapes.items():
        state[f"{name}.w"] = torch.randn(n_out, width, side, side) * 3 / (width * side**2) ** 0.5
        state[f"{name}.b"] = 0.03 * torch.randn(n_out)
    return state


def logits_by_hand(state, pixels):
    def convolve(name, x):
        return F.conv2d(x, state[f"{name}.w"], state[f"{name}.b"], padding="same")

    x = convolve("blocks.input", 0.8 * pixels + 0.1)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            start = f"blocks.group_{group}.block_{block}"
            y = x
            for i in (1, 2, 3, 4):
                y = convolve(f"{start}.res_path.conv_{i}", F.relu(y))
            x = (convolve(f"{start}.id_path", x) if f"{start}.id_path.w" in state else x) + y / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    return convolve("blocks.output.conv", F.relu(x))


@pytest.fixture
def file(tmp_path):
    torch.save(state_dict(), tmp_path / "dalle.pth")
    return tmp_path / "dalle.pth"


def test_logits_agree_with_the_encoder_written_out(file):
    tokenizer, vocabulary = read_dalle(file, (6, 6))
    pixels = torch.rand(2, 3, 3, 3).round().repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    expected = logits_by_hand(state_dict(), pixels)
    assert vocabulary == TOKENS
    assert expected.shape == (2, TOKENS, 6, 6)
    torch.testing.assert_close(tokenizer.logits(pixels), expected)
    normalised = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    tokens = tokenizer(normalised)  # 48 px are 6 tokens of 8 px: nothing is resized
    assert tokens.tolist() == expected.argmax(1).flatten(1).tolist()
    assert len(tokens.unique()) > 3


def test_an_image_of_224_px_is_seen_at_112(file):
    tokenizer, _ = read_dalle(file, (14, 14))
    seen = []
    tokenizer.blocks["input"].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    assert tokenizer(torch.zeros(1, 3, 224, 224)).shape == (1, 196)
    assert seen[0].shape == (1, 3, 112, 112)
    expected = 0.8 * torch.tensor(MEAN)[:, None, None] + 0.1
    torch.testing.assert_close(seen[0][0], expected.expand(3, 112, 112))


def test_it_has_the_size_of_the_released_encoder_and_is_not_saved():
    # openai/DALL-E: Encoder() has 74 tensors, 53,786,240 values.
    tokenizer = DalleTokenizer((14, 14))
    tensors = [b for name, b in tokenizer.named_buffers() if name.startswith("blocks.")]
    assert (len(tensors), sum(b.numel() for b in tensors)) == (74, 53_786_240)
    assert not tokenizer.state_dict()
    assert not list(tokenizer.parameters())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"blocks.group_2.block_1.id_path.w": None}, "has no blocks.group_2.block_1.id_path.w, which DALL-E's encoder"),
        ({"blocks.input.b": torch.zeros(9)}, r"blocks.input.b is \[9\] where DALL-E's encoder has \[8\]"),
        ({"blocks.output.conv.w": None}, "has no blocks.output.conv.w: give the state dict of DALL-E's encoder"),
        ({"more": torch.zeros(1)}, "has more, which DALL-E's encoder does not have"),
    ],
)
def test_a_file_that_is_not_dall_e_s_encoder_is_refused(tmp_path, change, sentence):
    state = {name: tensor for name, tensor in (state_dict() | change).items() if tensor is not None}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=sentence):
        read_dalle(tmp_path / "other.pth", (6, 6))


def test_a_pickled_module_is_not_loaded(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "encoder.pkl")
    with pytest.raises(CheckpointError, match=r"wants to run torch.nn.modules.linear.Linear while loading: refused"):
        read_dalle(tmp_path / "encoder.pkl", (6, 6))
