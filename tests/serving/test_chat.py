"""`/v1/chat/completions`: what the official client gets is what `generate` gives."""

import concurrent.futures
import time

import openai
import pytest
import torch
from PIL import Image

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, default_checkpoint
from lavit_hf.serving import TransformersBackend
from lavit_hf.serving.jobs import Prompt, TextJob, TextOptions

from .conftest import NAME, ROOT, SECONDS, TINY, data_url, open_base64, picture_message, wait_until

SCENE = ROOT / "examples" / "images" / "scene.png"
QUESTION = {"role": "user", "content": "What color is the cat?"}


def ask(client, messages, **options):
    return client.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 12, **options})


def text_of(answer) -> str:
    return answer.choices[0].message.content


def generated(pipeline, messages, max_new_tokens=12, processor_kwargs=None, **options) -> str:
    """The same by hand."""
    inputs = pipeline.processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"return_tensors": "pt", **(processor_kwargs or {})},
    )
    output = pipeline.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    return pipeline.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def pictures_and_question(images):
    urls = [data_url(image) for image in images]
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "What is it?"}]
    return [picture_message(*urls, text="What is it?")], [{"role": "user", "content": parts}]


def test_text(client, pipeline) -> None:
    answer = ask(client, [QUESTION])
    assert text_of(answer) == generated(pipeline, [QUESTION]) != ""
    assert text_of(ask(client, [QUESTION], modalities=["text", "text"])) == text_of(answer)
    assert answer.model == NAME and answer.choices[0].finish_reason == "length"
    prompt = pipeline.processor.apply_chat_template([QUESTION], tokenize=True, add_generation_prompt=True)
    assert answer.usage.prompt_tokens == len(prompt[0])
    assert answer.usage.completion_tokens == 12 and answer.usage.total_tokens == answer.usage.prompt_tokens + 12


@pytest.mark.parametrize("number", [1, 2])
def test_pictures(client, pipeline, images, number: int) -> None:
    messages, by_hand = pictures_and_question(images[:number])
    answer = ask(client, messages)
    assert text_of(answer) == generated(pipeline, by_hand)
    inputs = pipeline.processor.image_processor(images[:number], return_tensors="pt")
    kept = pipeline.model.visual_tokenizer.embed(inputs["pixel_values"]).num_tokens.sum().item()
    assert answer.usage.prompt_tokens_details.image_tokens == kept
    assert text_of(answer) != text_of(ask(client, [{"role": "user", "content": "What is it?"}]))


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        ({"num_image_tokens": 3}, 6),
        ({"num_image_tokens": [1, 4]}, 5),
        ({"keep_rate": 0.5}, 16),
        ({"max_total_image_tokens": 7}, 7),
        ({"num_image_tokens": 3, "visual_mode": "discrete"}, 6),
    ],
)
def test_budgets(client, pipeline, images, budget: dict, tokens: int) -> None:
    messages, by_hand = pictures_and_question(images[:2])
    answer = ask(client, messages, extra_body=budget)
    assert text_of(answer) == generated(pipeline, by_hand, processor_kwargs=budget)
    assert answer.usage.prompt_tokens_details.image_tokens == tokens


def test_requests_share_batches_and_change_nothing(serve, slow, backend, client, images) -> None:
    of_pictures = [pictures_and_question(images[:number])[0] for number in (1, 2, 3)]
    prompts = [[QUESTION], [{"role": "user", "content": "Hi"}], *of_pictures]
    alone = [text_of(ask(client, messages)) for messages in prompts]
    server = serve(slow, prepare_with=backend)
    shared = server.client
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(ask, shared, messages) for messages in prompts * 4]
        wait_until(lambda: server.engine.size == 20)
        slow.may_go_on.set()
        assert [text_of(answer.result()) for answer in answers] == alone * 4
    # One of what had come first, one of the rest of the texts, and two of the rest of the pictures, of at most 8 each.
    assert server.engine.metrics.registry.get_sample_value("lavit_batch_jobs_count", {"worker": "writer"}) <= 4


def test_a_batch_never_needs_more_positions_than_there_are(backend, monkeypatch) -> None:
    """Regression: a long prompt and a long answer of different rows did, which failed with learned positions."""
    widths = []
    generate = backend.model.generate

    def watched(input_ids, max_new_tokens, **options):
        widths.append((input_ids.shape[1], max_new_tokens))
        return generate(input_ids=input_ids, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(backend.model, "generate", watched)
    most = backend.max_length
    jobs = []
    for length, new in ((most - 4, 4), (3, 20), (5, 2)):
        prompt = Prompt(torch.full((length,), 5))
        jobs.append(TextJob(prompt, time.monotonic() + SECONDS, TextOptions(), new, backend.decode, [-1]))
    backend.write(jobs)
    assert all(job.future.done() for job in jobs)
    assert sorted(widths) == [(5, 20), (most - 4, 4)]


def test_seeds_decide_whoever_shares_the_batch(client, pipeline) -> None:
    options = {"temperature": 1.5, "top_p": 0.9}
    sampled = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0}
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    expected = [generated(pipeline, [QUESTION], generator=[one], **sampled) for one in generators]
    assert len(set(expected)) > 3
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda seed: text_of(ask(client, [QUESTION], seed=seed, **options)), range(6)))
    assert found == expected
    several = ask(client, [QUESTION], seed=1, n=3, **options)
    assert [choice.message.content for choice in several.choices] == expected[1:4]
    unseeded = {text_of(ask(client, [QUESTION], **options)) for _ in range(3)}
    assert len(unseeded) > 1


@pytest.mark.parametrize("options", [{}, {"stop": ["a", "zz"]}, {"temperature": 1.0, "seed": 3, "n": 2}])
def test_streamed_text_is_the_whole_text(client, images, options: dict) -> None:
    messages, _ = pictures_and_question(images[:1])
    whole = ask(client, messages, max_tokens=30, **options)
    stream = ask(client, messages, max_tokens=30, stream=True, stream_options={"include_usage": True}, **options)
    texts, reasons, usage = {}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage


def test_stop_words(client, pipeline) -> None:
    text = generated(pipeline, [QUESTION], 30)
    word = text[len(text) // 2 :][:3]
    answer = ask(client, [QUESTION], max_tokens=30, stop=word)
    assert text_of(answer) == text.partition(word)[0].rstrip()
    assert answer.choices[0].finish_reason == "stop"


def test_beams_as_the_original_searches(client, pipeline, images) -> None:
    messages, by_hand = pictures_and_question(images[:1])
    options = {"num_beams": 3, "length_penalty": 0.0}
    answer = ask(client, messages, extra_body={**options, "min_tokens": 2})
    assert text_of(answer) == generated(pipeline, by_hand, min_new_tokens=2, **options)


def test_typed_placeholders_stay_text(client, pipeline) -> None:
    typed = [{"role": "user", "content": "What does <image> or <visual_3> mean?"}]
    answer = ask(client, typed)
    assert text_of(answer) == generated(pipeline, typed)
    assert answer.usage.prompt_tokens_details.image_tokens == 0


def test_answers_can_be_sent_back(client) -> None:
    first = ask(client, [QUESTION]).choices[0].message
    assert text_of(ask(client, [QUESTION, first, {"role": "user", "content": "Why?"}]))


def test_pictures_out(client, pipeline, images) -> None:
    options = {"modalities": ["image"], "seed": 5, "extra_body": {"num_inference_steps": 2}}
    answer = ask(client, [picture_message(data_url(images[0]), text="in the snow")], **options)
    message = answer.choices[0].message
    (picture,) = message.images
    found = open_base64(picture["image_url"]["url"].partition(",")[2])
    expected = pipeline(
        [images[0], "in the snow"], num_inference_steps=2, generator=[torch.Generator().manual_seed(5)]
    )
    assert found.tobytes() == expected.images[0].tobytes()
    assert answer.usage.completion_tokens >= len(expected.codes[0])
    (streamed,) = [
        chunk.choices[0].delta.images
        for chunk in ask(client, [picture_message(data_url(images[0]), text="in the snow")], stream=True, **options)
        if getattr(chunk.choices[0].delta, "images", None)
    ]
    assert streamed[0]["image_url"] == picture["image_url"]
    # What was drawn can be asked about.
    assert text_of(ask(client, [picture_message(picture["image_url"]["url"], text="What is it?")]))


def test_drawn_answers_can_be_sent_back(client, pipeline) -> None:
    prompt = {"role": "user", "content": "a cat"}
    options = {"modalities": ["image"], "seed": 5, "extra_body": {"num_inference_steps": 2}}
    drawn = ask(client, [prompt], **options).choices[0].message
    assert drawn.content is None
    url = drawn.images[0]["image_url"]["url"]
    picture = {"type": "image", "image": open_base64(url.partition(",")[2])}
    question = {"role": "user", "content": "What is it?"}
    answer = ask(client, [prompt, drawn, question])
    by_hand = [prompt, {"role": "assistant", "content": [picture]}, question]
    assert text_of(answer) == generated(pipeline, by_hand)
    assert answer.usage.prompt_tokens_details.image_tokens > 0
    # Pieces of a stream hold empty text instead, and number their pictures.
    streamed = {"role": "assistant", "content": "", "images": [{**drawn.images[0], "index": 0}]}
    assert text_of(ask(client, [prompt, streamed, question])) == text_of(answer)
    # It can be changed, too, as if the user had sent it.
    changed = ask(client, [prompt, drawn, {"role": "user", "content": "in the snow"}], **options)
    expected = ask(client, [prompt, picture_message(url, text="in the snow")], **options)
    assert changed.choices[0].message.images == expected.choices[0].message.images


def test_a_trained_checkpoint_describes_a_scene(serve) -> None:
    scenes = default_checkpoint()
    model = LavitForConditionalGeneration.from_pretrained(scenes).eval()
    processor = ImageTextProcessor.from_pretrained(scenes, visual_tokenizer=model)
    client = serve(TransformersBackend(model, processor)).client
    with Image.open(SCENE) as image:
        message = picture_message(data_url(image.convert("RGB")))
    inputs = processor(images=SCENE, text="<image>", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    answer = ask(client, [message], max_tokens=40)
    assert text_of(answer) == expected and answer.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, [message], max_tokens=40, stream=True)]
    assert "".join(pieces) == expected and sum(map(bool, pieces)) > 3
    word = expected.split()[2]
    stopped = ask(client, [message], max_tokens=40, stop=[word])
    assert text_of(stopped) == expected.partition(word)[0].rstrip()
    assert stopped.usage.completion_tokens < answer.usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match="writes text only"):
        ask(client, [message], modalities=["image"])


def test_models(client) -> None:
    (model,) = client.models.list().data
    assert model.id == NAME and client.models.retrieve(NAME).id == NAME


def test_added_tokens_are_no_images(pipeline) -> None:
    """They come after the codes; prompts with images are drawn with another guidance."""
    processor = ImageTextProcessor.from_pretrained(TINY, visual_tokenizer=pipeline.model)
    processor.tokenizer.add_tokens(["<point>"])
    backend = TransformersBackend(pipeline.model, processor, pipeline)
    (added,) = processor.tokenizer.encode("<point>", add_special_tokens=False)
    assert added > pipeline.model.config.visual_token_offset
    prompt = backend.prepare([{"role": "user", "content": "a <point> cat"}], generation_mode="image")
    assert added in prompt.input_ids and not prompt.has_images
