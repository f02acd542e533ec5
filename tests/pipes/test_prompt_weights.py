"""Weights of words: the formula against a loop over tokens, the tokens that it reaches, and whole pipelines."""

import pytest
import torch
from torch import Tensor

from pipelines.inputs.prompt_syntax import Span, parse_weights
from pipelines.inputs.prompt_weights import (
    WeightedTokens,
    generate_weighted,
    tokenize_weighted,
    trouble_with,
    weight_states,
    weighted,
)
from tests.families.every import build, options
from tests.pipes.test_next_scale_text import of_bits
from tests.pipes.tiny import tiny_text_to_image_pipeline, tiny_tokenizer
from tests.pipes.tiny_video import tiny_video_pipeline

WEIGHTED = "a (red:1.4) apple"


def weight_states_reference(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Weight a token at a time, as ComfyUI's `encode_token_weights` does."""
    result = states.clone()
    for prompt in range(len(states)):
        for token in range(states.shape[1]):
            if weights[prompt, token] != 1:
                moved = (states[prompt, token] - empty[prompt, token]) * weights[prompt, token]
                result[prompt, token] = moved + empty[prompt, token]
    return result


def test_the_formula_is_that_of_a_loop_over_tokens():
    torch.manual_seed(0)
    states, empty = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    weights = torch.tensor([[1, 1.4, 1, 0.5, -1], [1, 1, 1, 1, 1]])
    found = weight_states(states, empty, weights)
    torch.testing.assert_close(found, weight_states_reference(states, empty, weights))
    assert torch.equal(found[1], states[1])
    assert torch.equal(found[0, 0], states[0, 0])


def test_the_mean_is_restored():
    torch.manual_seed(0)
    states = torch.randn(2, 5, 8) + 1
    weights = torch.tensor([[1, 2.0, 1, 0.5, 1], [1, 1, 1, 1, 1]])
    found = weight_states(states, states, weights, "mean")
    torch.testing.assert_close(found.mean((1, 2)), states.mean((1, 2)))
    ratios = (found / states)[0].mean(-1)  # (L,)
    torch.testing.assert_close(ratios / ratios[0], weights[0])
    assert torch.equal(found[1], states[1])


# --------------------------------------------------------------------------------- tokens


def test_tokens_have_the_weights_of_their_characters():
    tokenizer = tiny_tokenizer()
    tokens, _ = tokenize_weighted(tokenizer, parse_weights("A (red:1.4) apple, (blue sky:0.5)"))
    words = [tokenizer.decode([one]).strip() for one in tokens.ids]
    by_weight = {
        weight: "".join(word for word, one in zip(words, tokens.weights, strict=True) if one == weight)
        for weight in (1.0, 1.4, 0.5)
    }
    assert by_weight == {1.4: "red", 0.5: "bluesky", 1.0: "Aapple,</s>"}


def test_a_row_may_be_filled_up_or_cut_off_but_nothing_else():
    tokens = WeightedTokens((5, 6, 7, 1), (1.0, 2.0, 3.0, 1.0))
    filled = frozenset({0, 1})
    assert tokens.place([5, 6, 7, 1, 0, 0], filled).tolist() == [1, 2, 3, 1, 1, 1]
    assert tokens.place([0, 0, 5, 6, 7, 1], filled).tolist() == [1, 1, 1, 2, 3, 1]
    assert tokens.place([5, 6, 1], filled).tolist() == [1, 2, 1]
    for row in ([9, 5, 6, 7, 1, 0], [5, 6, 7, 1, 9], [5, 6, 8, 1], [5, 8, 1]):
        assert tokens.place(row, filled) is None


# ------------------------------------------------------------------------------ pipelines


def images_of(name, prompt, call=None, **more):
    """Generate with a tiny pipeline of a family of diffusers, two steps."""
    pipe = build(name)
    pipe.set_progress_bar_config(disable=True)
    given = {**options(name), "num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt", **more}
    given |= {"num_frames": 5} if name == "wan" else {}
    output = (call or pipe)(prompt=prompt, generator=torch.Generator().manual_seed(0), **given)
    return output.frames if name == "wan" else output.images


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "wan"])
def test_weights_reach_families_of_diffusers(name):
    def call(**given):
        return generate_weighted(build(name), **given)

    plain = images_of(name, "a red cat")
    assert torch.equal(images_of(name, "a red cat", call), plain)
    changed = images_of(name, "a (red:1.6) cat", call)
    assert not torch.equal(changed, plain)
    assert not torch.equal(changed, images_of(name, "a red (cat:1.6)", call))
    assert torch.equal(images_of(name, "a red cat"), plain)  # nothing stays behind


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "lumina2"])
def test_templates_are_refused(name):
    with pytest.raises(ValueError, match=r"text_encoder .*template; leave them out"):
        images_of(name, "a (red:1.6) cat", lambda **given: generate_weighted(build(name), **given))


OURS = {
    "stickers": (tiny_text_to_image_pipeline, {"num_inference_steps": 2}),
    "clips": (tiny_video_pipeline, {"num_inference_steps": 2, "num_frames": 2}),
    "next scale": (of_bits, {}),
}


@pytest.mark.parametrize("kind", OURS)
def test_weights_reach_ours(kind):
    make, more = OURS[kind]
    pipe = make()

    def call(prompt, negative=None):
        generator = torch.Generator().manual_seed(0)
        output = generate_weighted(
            pipe, prompt, negative, generator=generator, output_type="pt", guidance_scale=3.0, **more
        )
        return output.frames if kind == "clips" else output.images

    generator = torch.Generator().manual_seed(0)
    output = pipe("a red apple", generator=generator, output_type="pt", guidance_scale=3.0, **more)
    plain = output.frames if kind == "clips" else output.images
    assert torch.equal(call("a red apple"), plain)
    assert not torch.equal(call("a (red:3) apple"), plain)
    assert not torch.equal(call("a red apple", "a (blue:3) cat"), call("a red apple", "a blue cat"))


def test_states_of_ours_are_weighted_where_the_word_stands():
    pipe = tiny_text_to_image_pipeline()
    plain, *_ = pipe.encode_prompt("a red apple", do_classifier_free_guidance=False)
    empty = torch.zeros_like(plain)
    with weighted(pipe, [parse_weights(WEIGHTED)]):
        found, *_ = pipe.encode_prompt("a red apple", do_classifier_free_guidance=False)
    tokens = tokenize_weighted(pipe.tokenizer, parse_weights(WEIGHTED))[0]
    moved = (found != plain).any(-1)[0].tolist()
    assert moved == [weight != 1 for weight in tokens.weights]
    assert not torch.equal(found, weight_states(plain, empty, torch.tensor([tokens.weights])))  # e isn't zero
    again, *_ = pipe.encode_prompt("a red apple", do_classifier_free_guidance=False)
    assert torch.equal(again, plain)


def test_several_prompts_have_weights_of_their_own():
    pipe = tiny_text_to_image_pipeline()
    texts = ["a red apple", "three small green frogs on a yellow background"]
    plain, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    with weighted(pipe, [parse_weights("three (small:2) green frogs on a yellow background"), [Span(texts[0])]]):
        found, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[1], plain[1])


def test_what_cannot_be_weighted_says_why():
    pipe = tiny_text_to_image_pipeline()
    with pytest.raises(ValueError, match="given twice"), weighted(pipe, [parse_weights("(a:2) b"), [Span("a b")]]):
        pass
    with pytest.raises(ValueError, match=r"another form"), weighted(pipe, [parse_weights("(a:2) b")]):
        pipe.encode_prompt("something else", do_classifier_free_guidance=False)
    pipe.register_modules(text_encoder=None)
    assert "no text encoder" in trouble_with(pipe)
    with pytest.raises(ValueError, match="no text encoder"), weighted(pipe, [parse_weights("(a:2) b")]):
        pass
    with weighted(pipe, [parse_weights("a b")]):  # nothing to do
        pass
