"""Guided attention: against attention that is computed by hand, and that a U-Net learns by it where to look."""

import pytest
import torch

from lavit_hf.training.pixel_decoder.guided_attention import GuidedAttention
from lavit_hf.training.pixel_decoder.loss import PixelDecoderLoss
from lavit_hf.training.pixel_decoder.pixel_decoder import build_pixel_decoder
from tiny_pixel_decoders import build_pipeline, build_token_decoder, build_vae, unet_config
from training.pixel_decoder.tiny_trainers import build_trainer

CODES = {"codes": torch.tensor([3, 1, 4, 1, 5]), "num_tokens": [2, 3]}


def inputs(height: int = 8, width: int = 8, drop: tuple[bool, bool] = (False, False), seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 4, height, width)
    return CODES | {
        "latents": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "timesteps": torch.tensor([999, 999]),
        "drop_condition": torch.tensor(drop),
    }


def loss_of(pipeline, weight: float = 0.1) -> PixelDecoderLoss:
    return PixelDecoderLoss(
        pipeline.unet, pipeline.token_decoder, pipeline.scheduler.config, guided_attention_weight=weight
    )


class RecordingProcessor:
    """What diffusers offers to look at attention."""

    def __init__(self) -> None:
        self.probabilities: list[torch.Tensor] = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **options):
        query, key, value = (
            attn.head_to_batch_dim(tensor)
            for tensor in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        attention = attn.get_attention_scores(query, key, None)
        self.probabilities.append(attention.unflatten(0, (-1, attn.heads)))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(attention @ value)))


def near(places: tuple[int, int], side: int = 4) -> torch.Tensor:
    """Which conditions are within 1.2 patches of a place, one pair after another."""
    height, width = places
    rows = []
    for place in range(height * width):
        y, x = (place // width + 0.5) * side / height, (place % width + 0.5) * side / width
        distances = [((y - k // side - 0.5) ** 2 + (x - k % side - 0.5) ** 2) ** 0.5 for k in range(side**2)]
        rows.append([distance < 1.2 for distance in distances])
    return torch.tensor(rows)


@pytest.mark.parametrize(("latents", "places"), [((8, 8), (4, 4)), ((8, 16), (4, 8)), ((10, 6), (5, 3))])
def test_the_loss_is_that_of_the_attention_itself(latents, places):
    pipeline = build_pipeline()
    recorder = RecordingProcessor()
    processors = dict(pipeline.unet.attn_processors)
    watched = [name for name in processors if ".attn2." in name and not name.startswith("down_blocks.")]
    assert len(watched) == 3  # one in the middle, two on the way up
    pipeline.unet.set_attn_processor(processors | dict.fromkeys(watched, recorder))
    output = loss_of(pipeline)(**inputs(*latents))
    expected = []
    for attention in recorder.probabilities:
        assert attention.shape[1:] == (2 * 2, places[0] * places[1], 16)  # heads, places, conditions
        share = (attention[:, :2] * near(places)).sum(-1)
        expected.append(-(share + 1e-6).log().mean())
    assert len(expected) == 3
    torch.testing.assert_close(output["guided_attention"], torch.stack(expected).mean())
    torch.testing.assert_close(output["loss"], output["per_sample"].mean() + 0.1 * output["guided_attention"])


def test_places_and_the_conditions_near_them():
    guided = GuidedAttention(build_pipeline().unet, 16)
    own = guided._near(4, 4, torch.device("cpu"))
    assert own[5].nonzero().flatten().tolist() == [1, 4, 5, 6, 9] and own[0].nonzero().flatten().tolist() == [0, 1, 4]
    coarse = guided._near(2, 2, torch.device("cpu"))
    assert coarse[3].nonzero().flatten().tolist() == [10, 11, 14, 15]


def test_a_dropped_condition_has_no_part_in_it():
    pipeline = build_pipeline()
    loss = loss_of(pipeline)
    both, first, second, none = (
        loss(**inputs(drop=drop))["guided_attention"].item()
        for drop in ((False, False), (False, True), (True, False), (True, True))
    )
    assert none == 0 and first > 0 and second > 0 and first + second == pytest.approx(both)


@pytest.mark.parametrize("highres", [True, False])
def test_a_unet_learns_where_to_look(highres):
    pipeline = build_pipeline(highres)
    loss = loss_of(pipeline, weight=1.0)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.01)
    course = []
    for update in range(80):
        given = inputs(seed=update)
        if highres:
            given["time_ids"] = torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(2, -1)
        output = loss(**given)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        course.append(output["guided_attention"].item())
    chance = -near((4, 4)).float().mean(-1).log().mean().item()
    assert course[0] == pytest.approx(chance, abs=0.2) and sum(course[-5:]) / 5 < 0.65 * chance


def test_the_unet_is_left_as_it_was():
    guided, plain = (loss_of(build_pipeline(), weight) for weight in (0.1, 0.0))
    names = list(guided.state_dict())
    outputs = [loss(**inputs())["per_sample"] for loss in (guided, plain)]
    assert torch.equal(*outputs)
    assert names == list(plain.state_dict()) == list(guided.state_dict())
    assert not any(module._forward_pre_hooks for module in guided.modules())
    assert "guided_attention" not in plain(**inputs())


def test_what_cannot_be_guided():
    with pytest.raises(ValueError, match="square grid of conditions; the token decoder has 12"):
        GuidedAttention(build_pipeline().unet, 12)
    torch.manual_seed(0)
    plain_blocks = {"up_block_types": ["UpBlock2D", "UpBlock2D"], "mid_block_type": None}
    pipeline = build_pixel_decoder(build_token_decoder(), build_vae(), {**unet_config(), **plain_blocks})
    with pytest.raises(ValueError, match="cross-attention in its middle or on its way up"):
        loss_of(pipeline)
    with pytest.raises(ValueError, match="leave out gradient_checkpointing or guided_attention_weight"):
        loss_of(build_pipeline()).enable_gradient_checkpointing()


def test_the_option_reaches_the_loss_and_is_checked(tmp_path):
    trainer = build_trainer(tmp_path, guided_attention_weight=0.25)
    assert trainer.loss.guided_attention_weight == 0.25
    with pytest.raises(ValueError, match="`guided_attention_weight` must be at least 0; got -1"):
        build_trainer(tmp_path, guided_attention_weight=-1)
