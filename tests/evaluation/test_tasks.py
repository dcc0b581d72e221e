"""Tasks predict, score and show samples; images have as many tokens as their tokenizer says."""

import copy

import numpy as np
import pytest
from accelerate import cpu_offload
from PIL import Image
from transformers import GenerationConfig

from lavit_hf import ImageTextProcessor
from lavit_hf.data.scenes import Scene, captions_of, object_coverage, render
from lavit_hf.data.worlds import WORLDS
from lavit_hf.evaluation import EvaluatedCheckpoint
from lavit_hf.evaluation.data.samples import EvaluationData, EvaluationSample, read_scenes
from lavit_hf.evaluation.measurement import cluster_interval, wilson_interval
from lavit_hf.evaluation.tasks import (
    TASKS,
    CaptionTask,
    ReconstructionTask,
    TextToImageTask,
    VqaTask,
    measure_tokens,
    tokenize_images,
)
from lavit_hf.pipelines.image_to_text import ANSWER, CAPTION
from tiny_pixel_decoders import build_safety_checker


def test_tokens_are_those_of_both_branches(evaluated):
    images = [sample.open_image() for sample in read_scenes("caption", None, 4).samples]
    found = tokenize_images(evaluated.model, evaluated.processor, images)
    pixel_values = evaluated.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    visual_tokenizer = evaluated.model.visual_tokenizer
    discrete, continuous = visual_tokenizer.encode(pixel_values), visual_tokenizer.embed(pixel_values)
    assert [code for of_image in found for code in of_image["codes"]] == discrete.codes.tolist()
    assert [of_image["num_tokens"]["discrete"] for of_image in found] == discrete.num_tokens.tolist()
    assert [of_image["num_tokens"]["continuous"] for of_image in found] == continuous.num_tokens.tolist()
    for image, together in zip(images, found, strict=True):
        assert tokenize_images(evaluated.model, evaluated.processor, [image]) == [together]
    offloaded = cpu_offload(copy.deepcopy(evaluated.model), "cpu")
    assert offloaded.visual_tokenizer.device.type == "meta"  # between calls
    assert tokenize_images(offloaded, evaluated.processor, images) == found


def test_numbers_of_tokens_are_related_to_what_is_there():
    samples = read_scenes("caption", None, 30).samples
    areas = [object_coverage(Scene.from_dict(sample.meta["scene"])).sum() for sample in samples]
    noise = np.random.default_rng(0).permutation(30).tolist()
    records = [
        {"meta": sample.meta, "codes": [number % 3], "num_tokens": {"discrete": round(area), "continuous": other}}
        for number, (sample, area, other) in enumerate(zip(samples, areas, noise, strict=True))
    ]
    found = measure_tokens(records, codebook_size=6)
    assert found["tokens/discrete/r_with_object_area"].value == pytest.approx(1, abs=1e-4)
    assert abs(found["tokens/continuous/r_with_object_area"].value) < 0.4
    assert found["tokens/continuous/mean"].value == pytest.approx(np.mean(noise))
    assert found["tokens/continuous/std"].value == pytest.approx(np.std(noise))
    assert (found["live_codes"].value, found["live_codes"].n) == (0.5, 6)


def test_photographs_have_no_objects_to_compare_with():
    found = measure_tokens([{"meta": {}, "codes": [1], "num_tokens": {"discrete": 1, "continuous": 2}}], 4)
    assert "tokens/discrete/r_with_object_area" not in found and found["live_codes"].value == 0.25


SHORT = {"max_new_tokens": 6}
FAST = {"num_inference_steps": 2}


def record(sample: EvaluationSample, **values) -> dict:
    return {
        "id": sample.id,
        "question": sample.question,
        "references": list(sample.references),
        "meta": dict(sample.meta),
        **values,
    }


def other_data(samples, **values) -> EvaluationData:
    """The same samples as if nothing were known about them."""
    plain = [EvaluationSample(s.id, s.image, s.references, s.question) for s in samples]
    return EvaluationData("other", None, plain, **values)


@pytest.mark.parametrize(
    ("name", "options"),
    [("caption", SHORT), ("vqa", {}), ("text-to-image", FAST), ("reconstruction", FAST), ("editing", FAST)],
)
def test_a_sample_does_not_depend_on_the_others(evaluated, name, options):
    data = read_scenes(name, None, 5 if name != "vqa" else 1)
    task = TASKS[name](data, options)
    together = task.predict(evaluated, data.samples)
    assert len(together) == len(data.samples) >= 4
    for sample, predicted in zip(data.samples, together, strict=True):
        (alone,) = TASKS[name](data, options).predict(evaluated, [sample])
        assert alone.values == predicted.values
        if task.draws:
            difference = np.asarray(alone.picture, dtype=int) - np.asarray(predicted.picture, dtype=int)
            assert abs(difference).max() <= 1  # rounding
    if task.draws:  # another seed draws something else
        (other,) = TASKS[name](data, options, seed=1).predict(evaluated, data.samples[:1])
        assert other.picture.tobytes() != together[0].picture.tobytes()


def test_defaults_are_those_of_the_original_or_of_scenes(folder):
    scenes, other = read_scenes("caption", None, 1), other_data([], is_benchmark=True)
    own_budget = {"num_image_tokens": None, "visual_mode": None}  # left to the selector, and to the processor
    assert CaptionTask(other).options == {**CAPTION, **own_budget}
    assert VqaTask(other).options == {**ANSWER, **own_budget}
    assert VqaTask(scenes).options == {**ANSWER, "num_beams": 1, "min_new_tokens": 1, **own_budget}
    assert CaptionTask(scenes, {"num_beams": 4, "length_penalty": None}).options["num_beams"] == 4
    paper = TextToImageTask(other, {"clip": str(folder)}).options
    assert (paper["decoder"], paper["num_candidates"], paper["top_k"]) == ("lowres", 4, 300)
    assert (paper["guidance_scale"], paper["decoder_guidance_scale"], paper["num_inference_steps"]) == (1.5, 1.5, 50)
    assert TextToImageTask(scenes).options["num_candidates"] == 1
    assert TextToImageTask(other_data([])).options == TextToImageTask(scenes).options


def test_own_data_is_asked_as_the_checkpoint_says():
    config = GenerationConfig(num_beams=1, min_new_tokens=1)
    task = VqaTask(other_data([]), {"min_new_tokens": 3})
    task.follow(config)
    entering = {"num_image_tokens": None, "visual_mode": None}
    assert task.options == {**ANSWER, "num_beams": 1, "min_new_tokens": 3, **entering}
    task.follow(GenerationConfig())  # another checkpoint
    assert task.options == {**ANSWER, "min_new_tokens": 3, **entering}
    for data in (other_data([], is_benchmark=True), read_scenes("vqa", None, 1)):
        task = VqaTask(data, {"num_beams": 4})
        expected = dict(task.options)
        task.follow(config)
        assert task.options == expected


@pytest.mark.parametrize("name", ["caption", "vqa"])
def test_images_may_be_read_as_codes(evaluated, name):
    """Like a processor whose images are codes by themselves, and unlike features."""
    data = read_scenes(name, None, 3)
    asked = {mode: TASKS[name](data, {**SHORT, "visual_mode": mode}) for mode in ("continuous", "discrete", None)}
    texts = {
        mode: [one.values["prediction"] for one in asked[mode].predict(evaluated, data.samples)] for mode in asked
    }
    assert texts[None] == texts["continuous"] != texts["discrete"]
    assert asked["discrete"].settings()["options"]["visual_mode"] == "discrete"
    own = ImageTextProcessor(
        evaluated.processor.image_processor,
        evaluated.processor.tokenizer,
        image_seq_length=evaluated.processor.image_seq_length,
        visual_mode="discrete",
        visual_tokenizer=evaluated.model,
    )
    codes = EvaluatedCheckpoint("codes", evaluated.model, own)
    assert [one.values["prediction"] for one in asked[None].predict(codes, data.samples)] == texts["discrete"]


def test_wrong_options_are_refused(tmp_path):
    other = other_data([], is_benchmark=True)
    with pytest.raises(ValueError, match="no option 'beams'; it has num_beams"):
        CaptionTask(other, {"beams": 2})
    with pytest.raises(ValueError, match="at least 8 tokens .min_new_tokens., more than the 5 of max_new_tokens"):
        CaptionTask(other, {"max_new_tokens": 5})
    with pytest.raises(ValueError, match="best of 4 drawings is chosen by CLIP: --clip takes"):
        TextToImageTask(other)
    with pytest.raises(ValueError, match="--inception takes"):
        TextToImageTask(other, {"num_candidates": 1, "fid_weights": str(tmp_path / "nowhere.pt")})


def test_captions_of_scenes_are_scored_by_facts(evaluated, tmp_path):
    data = read_scenes("caption", None, 8)
    task = CaptionTask(data)
    tokens = {"codes": [1, 2], "num_tokens": {"discrete": 2, "continuous": 3}}
    scenes = [Scene.from_dict(sample.meta["scene"]) for sample in data.samples]
    right = [
        record(sample, prediction=captions_of(scene)[-1], **tokens)
        for sample, scene in zip(data.samples, scenes, strict=True)
    ]
    found = task.score(evaluated, right, tmp_path)
    assert found["fully_right"].value == found["relation"].value == 1.0
    assert found["live_codes"].value == 2 / 64 and found["tokens/continuous/mean"].value == 3
    assert task.show(data.samples[0], right[0], tmp_path).is_right
    half = right[:4] + [{**row, "prediction": "no idea"} for row in right[4:]]
    assert task.score(evaluated, half, tmp_path)["fully_right"].value == 0.5
    shown = task.show(data.samples[4], half[4], tmp_path)
    assert shown.is_right is False and ("caption", "no idea") in shown.lines
    assert shown.lines[-1][0] == "wrong" and "background" in shown.lines[-1][1]


def test_other_captions_are_scored_by_their_metrics(evaluated, tmp_path):
    data = other_data(read_scenes("caption", None, 5).samples)
    tokens = {"codes": [1], "num_tokens": {"discrete": 1, "continuous": 1}}
    right = [record(sample, prediction=sample.references[0], **tokens) for sample in data.samples]
    found = CaptionTask(data).score(evaluated, right, tmp_path)
    assert found["bleu_4"].value == pytest.approx(1) and found["bleu_4"].interval is None
    assert found["cider"].value > 5 and found["cider"].interval[0] <= found["cider"].value
    assert "fully_right" not in found
    assert CaptionTask(data).show(data.samples[0], right[0], tmp_path).is_right is None


def test_answers_are_scored_by_kind(evaluated, tmp_path):
    data = read_scenes("vqa", None, 6)
    task = VqaTask(data)
    records = [
        record(sample, prediction="?" if sample.meta["kind"] == "color" else sample.references[0].title() + ".")
        for sample in data.samples
    ]
    found = task.score(evaluated, records, tmp_path)
    assert found["exact_match/color"].value == 0.0 and found["exact_match/yes_no"].value == 1.0
    assert found["exact_match/yes_no"].n == 6 and found["exact_match"].n == len(data.samples)
    colors = sum(sample.meta["kind"] == "color" for sample in data.samples)
    assert found["exact_match"].value == pytest.approx(1 - colors / len(data.samples))
    kinds = [(sample.id.partition("-")[0], sample.meta["kind"]) for sample in data.samples]
    of_scene = [[kind != "color" for scene, kind in kinds if scene == f"{index:06d}"] for index in range(6)]
    expected = cluster_interval([*map(sum, of_scene)], [*map(len, of_scene)])
    assert found["exact_match"].interval == expected and found["exact_match/yes_no"].interval == wilson_interval(6, 6)
    shown = task.show(data.samples[0], records[0], tmp_path)
    assert shown.is_right is False and ("right answer", data.samples[0].references[0]) in shown.lines


def test_answers_of_several_people_count_by_how_many_agree(evaluated, tmp_path):
    sample = EvaluationSample("1", None, ("red",) * 2 + ("blue",) * 8, question="What color?")
    data = EvaluationData("vqa", None, [sample], answer_metric="vqa_accuracy")
    found = VqaTask(data).score(evaluated, [record(sample, prediction="red")], tmp_path)
    assert found["vqa_accuracy"].value == pytest.approx(0.6)  # of leaving each of the ten out


@pytest.mark.parametrize("task_class", [TextToImageTask, ReconstructionTask])
def test_drawings_of_scenes_are_judged(evaluated, tmp_path, task_class):
    data = read_scenes("caption", None, 6)
    values = {"codes": [1, 2], "num_tokens": {"discrete": 2, "continuous": 3}}
    records = []
    for index, sample in enumerate(data.samples):
        drawn = Scene.from_dict(sample.meta["scene"]) if index < 4 else Scene("black", ())
        render(drawn, 128).save(tmp_path / f"{index}.png")
        records.append(record(sample, picture=f"{index}.png", **values))
    task = task_class(data)
    found = task.score(evaluated, records, tmp_path)
    assert found["fully_right"].value == found["object_count"].value == 4 / 6
    assert found["judge_on_truth/fully_right"].value == 1.0
    shown = [task.show(sample, row, tmp_path) for sample, row in zip(data.samples, records, strict=True)]
    assert [one.is_right for one in shown] == [True] * 4 + [False] * 2
    assert shown[0].pictures[1][1].size == (128, 128)


def test_reconstructions_are_those_of_the_pipeline(evaluated):
    data = read_scenes("reconstruction", None, 2)
    task = ReconstructionTask(data, FAST)
    predictions = task.predict(evaluated, data.samples)
    generators = [task.generator(sample, "reconstruction") for sample in data.samples]
    images = [sample.open_image() for sample in data.samples]
    output = evaluated.pipeline(None).reconstruct(images, num_inference_steps=2, generator=generators)
    for predicted, picture, codes in zip(predictions, output.images, output.codes, strict=True):
        assert predicted.picture.tobytes() == picture.tobytes()
        assert predicted.values["codes"] == codes.tolist()
        assert predicted.values["num_tokens"]["discrete"] == len(codes)


@pytest.mark.parametrize("name", ["text-to-image", "reconstruction", "editing"])
@pytest.mark.parametrize("threshold", [-2.0, 2.0])
def test_drawings_that_a_safety_checker_blackened_are_counted(evaluated, tmp_path, name, threshold):
    pipeline = evaluated.pipeline(None)
    checked = type(pipeline)(**{**pipeline.components, **build_safety_checker(threshold)})
    checked.set_progress_bar_config(disable=True)
    checkpoint = EvaluatedCheckpoint("checked", evaluated.model, evaluated.processor, lambda decoder: checked)
    data = read_scenes(name, None, 2)
    task = TASKS[name](data, FAST)
    records = []
    for index, (sample, made) in enumerate(zip(data.samples, task.predict(checkpoint, data.samples), strict=True)):
        made.picture.save(tmp_path / f"{index}.png")
        records.append(record(sample, picture=f"{index}.png", **made.values))
        assert (made.picture.getbbox() is None) == made.values["blackened"] == (threshold < 0)
    found = task.score(checkpoint, records, tmp_path)["blackened"]
    assert (found.value, found.n) == (float(threshold < 0), 2)


@pytest.mark.parametrize("name", ["scenes", "emoji-small"])
def test_a_changed_picture_is_right_if_the_change_alone_is_there(evaluated, tmp_path, name):
    world = WORLDS[name]
    data = read_scenes("editing", None, 8, world)
    records, kinds = [], []
    for index, sample in enumerate(data.samples):
        after, before = (world.scene_from_dict(sample.meta[name]) for name in ("scene", "before"))
        assert sample.open_image().tobytes() == world.render(before).tobytes() != world.render(after).tobytes()
        world.render(after if index < 5 else before).save(tmp_path / f"{index}.png")
        records.append(record(sample, picture=f"{index}.png", codes=[1]))
        kinds.append(sample.meta["kind"])
    task = TASKS["editing"](data)
    found = task.score(evaluated, records, tmp_path)
    assert (found["fully_right"].value, found["unchanged"].value) == (5 / 8, 3 / 8)
    assert found["judge_on_truth/fully_right"].value == 1.0
    for kind in set(kinds):
        right = sum(its == kind for its in kinds[:5])
        assert (found[f"fully_right/{kind}"].value, found[f"fully_right/{kind}"].n) == (
            right / kinds.count(kind),
            kinds.count(kind),
        )
    shown = [task.show(sample, row, tmp_path) for sample, row in zip(data.samples, records, strict=True)]
    assert [one.is_right for one in shown] == [True] * 5 + [False] * 3


def test_changes_are_drawn_after_the_picture(evaluated):
    data = read_scenes("editing", None, 2)
    task = TASKS["editing"](data, FAST)
    predictions = task.predict(evaluated, data.samples)
    prompts = [[sample.open_image(), sample.references[0]] for sample in data.samples]
    generators = [task.generator(sample, "drawing") for sample in data.samples]
    output = evaluated.pipeline(None)(prompts, num_inference_steps=2, top_k=50, temperature=1.0, generator=generators)
    for predicted, picture in zip(predictions, output.images, strict=True):
        assert predicted.picture.tobytes() == picture.tobytes()


def test_the_best_of_several_drawings_is_kept(evaluated, tmp_path, monkeypatch):
    from evaluation.metrics.tiny_networks import save_tiny_clip
    from lavit_hf.evaluation.metrics.images import ClipSimilarity

    clip = str(save_tiny_clip(tmp_path / "clip"))
    data = other_data(read_scenes("text-to-image", None, 3).samples, is_benchmark=True)
    options = {**FAST, "decoder": None, "guidance_scale": 3.0, "decoder_guidance_scale": 3.0}
    pipeline, batch_sizes = evaluated.pipeline("lowres"), []
    draw = type(pipeline).__call__

    def counted(self, *args, **arguments):
        batch_sizes.append(arguments.get("batch_size"))
        return draw(self, *args, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline), "__call__", counted)
        best = TextToImageTask(data, {**options, "num_candidates": 3, "clip": clip}).predict(evaluated, data.samples)
    assert batch_sizes == [1]  # prompts at a time: three candidates are as many pictures as samples
    task = TextToImageTask(data, {**options, "num_candidates": 1, "clip": clip})
    similarity = ClipSimilarity(clip)
    chosen = []
    for sample, predicted in zip(data.samples, best, strict=True):
        candidates = evaluated.pipeline("lowres")(
            sample.references[0],
            num_images_per_prompt=3,
            generator=[task.generator(sample, "drawing", number) for number in range(3)],
            top_k=300,
            num_inference_steps=2,
            guidance_scale=3.0,
            decoder_guidance_scale=3.0,
        ).images
        chosen.append(similarity.choose_best(candidates, sample.references[0]))
        difference = np.asarray(candidates[chosen[-1]], dtype=int) - np.asarray(predicted.picture, dtype=int)
        assert abs(difference).max() <= 1
    assert chosen != [0, 0, 0]
    for sample, predicted in zip(data.samples, best, strict=True):
        predicted.picture.save(tmp_path / f"{sample.id}.png")
    records = [
        record(sample, picture=f"{sample.id}.png", **predicted.values)
        for sample, predicted in zip(data.samples, best, strict=True)
    ]
    found = task.score(evaluated, records, tmp_path)
    assert found["clip_score"].n == 3 and found["clip_score"].interval is not None
    assert "fully_right" not in found


def test_fid_compares_with_the_samples_pictures(evaluated, tmp_path):
    from evaluation.metrics.tiny_networks import save_mean_color

    data = other_data(read_scenes("text-to-image", None, 4).samples)
    options = {"num_candidates": 1, "fid_weights": str(save_mean_color(tmp_path / "inception.pt"))}
    task = TextToImageTask(data, options)
    values = []
    for shift in (0, 40):
        records = []
        for sample in data.samples:
            pixels = np.clip(np.asarray(sample.open_image(), dtype=int) + shift, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{sample.id}.png")
            records.append(record(sample, picture=f"{sample.id}.png", codes=[]))
        values.append(task.score(evaluated, records, tmp_path)["fid"].value)
    assert values[0] == pytest.approx(0, abs=1e-2) and values[1] > 100


def test_what_only_scores_depend_on_may_change_later(tmp_path):
    data = other_data([])
    weights = tmp_path / "weights.pt"
    weights.touch()
    without = TextToImageTask(data, {"num_candidates": 1})
    with_fid = TextToImageTask(data, {"num_candidates": 1, "fid_weights": str(weights), "clip": "clip"})
    assert without.settings() == with_fid.settings()
    chosen = [TextToImageTask(data, {"num_candidates": 2, "clip": clip}).settings() for clip in ("a", "b")]
    assert chosen[0] != chosen[1]


def test_emoji_are_captioned_asked_about_and_rebuilt(evaluated, tmp_path):
    world = WORLDS["emoji"]
    for task_type, options in ((CaptionTask, SHORT), (VqaTask, SHORT), (ReconstructionTask, FAST)):
        data = read_scenes(task_type.name, "unseen_artist", 2, world)
        task = task_type(data, options)
        records = []
        for index, prediction in enumerate(task.predict(evaluated, data.samples[:2])):
            values = dict(prediction.values)
            if prediction.picture is not None:
                prediction.picture.save(tmp_path / f"{index}.png")
                values["picture"] = f"{index}.png"
            records.append(record(data.samples[index], **values))
        found = task.score(evaluated, records, tmp_path)
        assert task.show(data.samples[0], records[0], tmp_path).is_right is False
        if task_type is VqaTask:
            assert found["exact_match"].n == 2 and "exact_match/background" in found
            continue
        assert found["fully_right"].value == 0 and found["tokens/discrete/mean"].n == 2
        assert set(world.fact_units) < set(found)
        if task_type is ReconstructionTask:
            assert found["judge_on_truth/fully_right"].value == 1
