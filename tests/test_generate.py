"""transformers' generate with the language model: guidance, caches, generators."""

import pytest
import torch
from modeling_helpers import (
    CODES,
    GUIDANCE,
    Collector,
    classes,
    count_forwards,
    guided_logits,
    plain_loop,
    seeded,
    stream,
)
from transformers import GenerationConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dar_hf import DARForCausalLM

# generate


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_greedy_generate_is_a_plain_loop(tiny_transformer, guidance):
    expected = plain_loop(tiny_transformer, [0, 3, 4], guidance)
    assert len(expected.unique()) > 4 and not torch.equal(expected[0], expected[1])
    codes = tiny_transformer.generate(classes(0, 3, 4), max_new_tokens=16, do_sample=False, guidance_scale=guidance)
    assert torch.equal(codes, torch.cat([classes(0, 3, 4), expected], dim=1))


def test_guidance_matters(tiny_transformer):
    results = [plain_loop(tiny_transformer, [0, 3, 4], guidance) for guidance in GUIDANCE]
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
    ],
)
@pytest.mark.parametrize("guidance", [1.0, (1.1, 8.0)])
def test_every_cache_gives_the_same_codes(tiny_transformer, options, guidance):
    expected = plain_loop(tiny_transformer, [0, 3], guidance)
    codes = tiny_transformer.generate(classes(0, 3), do_sample=False, guidance_scale=guidance, **options)
    assert torch.equal(codes[:, 1:], expected)
    sampling = {"do_sample": True, "guidance_scale": guidance}
    one = tiny_transformer.generate(classes(0, 3), generator=seeded(), **sampling)
    two = tiny_transformer.generate(classes(0, 3), generator=seeded(), **sampling, **options)
    assert torch.equal(one, two)


def test_a_static_cache_can_be_kept(tiny_transformer):
    cache = StaticCache(config=tiny_transformer.config, max_cache_len=17)
    for labels in ([0, 3], [4, 1]):
        options = {"do_sample": False, "guidance_scale": 4.0, "past_key_values": cache}
        codes = tiny_transformer.generate(classes(*labels), **options)[:, 1:]
        assert torch.equal(codes, plain_loop(tiny_transformer, labels, 4.0))
        cache.reset()


def test_guidance_is_one_doubled_pass_a_code(tiny_transformer):
    shapes = count_forwards(tiny_transformer)
    tiny_transformer.generate(classes(0, 3, 4), max_new_tokens=5, do_sample=False, guidance_scale=4.0)
    assert shapes == [(6, 1)] * 5
    shapes.clear()
    tiny_transformer.generate(classes(0, 3, 4), max_new_tokens=5, do_sample=False)
    assert shapes == [(3, 1)] * 5


def test_generate_continues_a_prefix_at_its_place_in_the_schedule(tiny_transformer):
    whole = plain_loop(tiny_transformer, [0, 3], (0.0, 9.0))
    prompt = torch.cat([classes(0, 3), whole[:, :7]], dim=1)
    options = {"do_sample": False, "guidance_scale": (0.0, 9.0)}
    assert torch.equal(tiny_transformer.generate(prompt, max_new_tokens=9, **options)[:, 1:], whole)
    # the schedule spans the whole image, however few codes are asked for
    few = tiny_transformer.generate(classes(0, 3), max_new_tokens=5, **options)
    assert torch.equal(few[:, 1:], whole[:, :5])


@pytest.mark.parametrize("guidance", [1.0, (0.0, 9.0)])
def test_padding_on_the_left_changes_nothing(tiny_transformer, guidance):
    """Also not the place in the guidance schedule, which counts from the class token."""
    whole = plain_loop(tiny_transformer, [0, 3], guidance)
    prompts = [torch.cat([classes(0), whole[:1, :5]], dim=1), torch.cat([classes(3), whole[1:, :2]], dim=1)]
    padded = torch.cat([torch.cat([torch.zeros(1, 6 - p.shape[1], dtype=torch.long), p], dim=1) for p in prompts])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    codes = tiny_transformer.generate(
        padded, attention_mask=mask, max_new_tokens=8, do_sample=False, guidance_scale=guidance
    )
    assert torch.equal(codes[0, 1:], whole[0, :13])
    assert torch.equal(codes[1, 4:], whole[1, :10])


def test_another_model_can_assist(tiny_transformer, make_transformer):
    assistant = make_transformer(num_hidden_layers=1)
    expected = tiny_transformer.generate(classes(3), do_sample=False, guidance_scale=1.0)
    codes = tiny_transformer.generate(classes(3), do_sample=False, guidance_scale=1.0, assistant_model=assistant)
    assert torch.equal(codes, expected)


def test_generate_from_embeddings(tiny_transformer):
    expected = tiny_transformer.generate(classes(0, 3), do_sample=False, max_new_tokens=6)
    embeddings = tiny_transformer.get_input_embeddings()(classes(0, 3))
    codes = tiny_transformer.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=6)
    assert torch.equal(codes, expected[:, 1:])


def test_casting_keeps_the_rotary_frequencies(tiny_transformer, make_transformer, tmp_path):
    tiny_transformer.save_pretrained(tmp_path)
    loaded = DARForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for cast in (make_transformer().to(torch.bfloat16), make_transformer().bfloat16()):
        assert cast.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(cast(classes(0, 3)).logits, loaded(classes(0, 3)).logits)


def test_rotary_embedding_is_llamas(tiny_transformer):
    embedding, positions = tiny_transformer.model.rotary_emb, torch.arange(7)[None].expand(2, -1)
    ours = embedding(torch.zeros(1), positions)
    theirs = LlamaRotaryEmbedding(tiny_transformer.config)(torch.zeros(1), positions)
    assert [tuple(table.shape) for table in ours] == [(2, 7, 32)] * 2
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_attentions_and_hidden_states(tiny_transformer):
    tiny_transformer.set_attn_implementation("eager")
    ids = torch.tensor([[32, 3, 4], [35, 7, 8]])
    output = tiny_transformer(ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 3, 64)] * 3
    assert [tuple(a.shape) for a in output.attentions] == [(2, 2, 3, 3)] * 2
    logits, _, hidden_states, attentions = tiny_transformer(
        ids, output_attentions=True, output_hidden_states=True, return_dict=False
    )
    assert torch.equal(logits, output.logits) and len(hidden_states) == 3 and len(attentions) == 2


def test_generate_makes_one_whole_image_unless_told_otherwise(tiny_transformer):
    assert tiny_transformer.generate(classes(0, 1), do_sample=False).shape == (2, 17)
    assert tiny_transformer.generate(classes(0, 1), do_sample=False, max_length=5).shape == (2, 5)
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    assert tiny_transformer.generate(classes(0, 1), generation_config=config).shape == (2, 7)


def test_generate_obeys_a_maximum_length_in_the_generation_config(tiny_transformer):
    config = GenerationConfig(max_length=5, do_sample=False)
    assert tiny_transformer.generate(classes(0, 1), generation_config=config).shape == (2, 5)


def test_guidance_defaults_to_that_of_the_generation_config(tiny_transformer):
    guided, plain = plain_loop(tiny_transformer, [2], 4.0), plain_loop(tiny_transformer, [2], 1.0)
    tiny_transformer.generation_config.guidance_scale = 4.0
    assert torch.equal(tiny_transformer.generate(classes(2), do_sample=False)[:, 1:], guided)
    assert torch.equal(tiny_transformer.generate(classes(2), do_sample=False, guidance_scale=1.0)[:, 1:], plain)
    assert torch.equal(stream(tiny_transformer, 2, temperature=0), guided)
    assert torch.equal(stream(tiny_transformer, 2, temperature=0, guidance_scale=1.0), plain)
    config = GenerationConfig(do_sample=False, guidance_scale=(1.1, 8.0), max_new_tokens=16)
    codes = tiny_transformer.generate(classes(2), generation_config=config)[:, 1:]
    assert torch.equal(codes, plain_loop(tiny_transformer, [2], (1.1, 8.0)))


def test_streamer_gets_every_code(tiny_transformer):
    streamer = Collector()
    options = {"do_sample": False, "guidance_scale": 4.0}
    codes = tiny_transformer.generate(classes(0, 3), streamer=streamer, **options)
    assert streamer.ended and len(streamer.values) == 17
    assert torch.equal(streamer.values[0], classes(0, 3))
    assert torch.equal(torch.stack(streamer.values[1:], dim=1), codes[:, 1:])


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_generator_decides_the_samples(tiny_transformer, guidance):
    def sample(seed):
        return tiny_transformer.generate(
            classes(0, 3), do_sample=True, guidance_scale=guidance, generator=seeded(seed), max_new_tokens=16
        )

    state = torch.get_rng_state()
    one, two, other = sample(1), sample(1), sample(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.shape == (2, 17) and one[:, 1:].max() < CODES
    assert not tiny_transformer.generation_config.do_sample


def test_without_a_generator_the_global_one_is_used(tiny_transformer):
    with torch.random.fork_rng():
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(tiny_transformer.generate(classes(0, 3), do_sample=True, guidance_scale=2.0))
            runs.append(stream(tiny_transformer, [0, 3]))
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3])
    assert not torch.equal(runs[0], runs[4]) and not torch.equal(runs[1], runs[5])


@pytest.mark.parametrize("guidance", [None, (1.1, 8.0)])
def test_list_of_generators_makes_every_image_independent(tiny_transformer, guidance):
    options = {"do_sample": True, "guidance_scale": guidance}
    batch = tiny_transformer.generate(classes(0, 3, 3), generator=[seeded(i) for i in range(3)], **options)
    streamed = stream(tiny_transformer, [0, 3, 3], guidance_scale=guidance, generator=[seeded(i) for i in range(3)])
    for i, label in enumerate([0, 3, 3]):
        alone = tiny_transformer.generate(classes(label), generator=seeded(i), **options)
        assert torch.equal(batch[i : i + 1], alone)
        alone = stream(tiny_transformer, label, guidance_scale=guidance, generator=seeded(i))
        assert torch.equal(streamed[i : i + 1], alone)
    assert not torch.equal(batch[1], batch[2]) and not torch.equal(streamed[1], streamed[2])


def test_num_return_sequences(tiny_transformer):
    options = {"do_sample": True, "guidance_scale": 3.0}
    generators = [seeded(i) for i in range(6)]
    codes = tiny_transformer.generate(classes(4, 0), num_return_sequences=3, generator=generators, **options)
    assert codes.shape == (6, 17)
    for i, label in enumerate([4, 4, 4, 0, 0, 0]):
        alone = tiny_transformer.generate(classes(label), generator=seeded(i), **options)
        assert torch.equal(codes[i : i + 1], alone)
    assert len({tuple(row) for row in codes.tolist()}) == 6


@pytest.mark.parametrize("way", ["generate", "stream_codes"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 3},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_samples_follow_the_distribution(tiny_transformer, way, options, guidance):
    count = 4000
    tiny_transformer.lm_head.weight.data *= 0.3  # no code far ahead of the others
    scores = guided_logits(tiny_transformer, 3, [], guidance).double() / options.get("temperature", 1.0)
    if "top_k" in options:
        scores[scores < scores.sort(descending=True).values[options["top_k"] - 1]] = -torch.inf
    probabilities = scores.softmax(-1)
    if "top_p" in options:
        ordered, order = probabilities.sort(descending=True)
        kept = order[: int((ordered.cumsum(0) < options["top_p"]).sum()) + 1]  # the fewest that reach it
        mask = torch.zeros(CODES, dtype=torch.bool).index_fill(0, kept, True)
        probabilities = torch.where(mask, probabilities, 0) / probabilities[mask].sum()
    options = options | {"guidance_scale": guidance, "generator": seeded()}
    if way == "generate":
        codes = tiny_transformer.generate(classes(*[3] * count), do_sample=True, max_new_tokens=1, **options)[:, 1]
    else:
        codes = stream(tiny_transformer, [3] * count, num_tokens=1, **options)[:, 0]
    frequencies = torch.bincount(codes, minlength=CODES) / count
    assert not frequencies[probabilities == 0].any()
    deviation = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((frequencies - probabilities).abs() <= 4 * deviation + 1 / count).all()
    assert (probabilities > 0).sum() > 2


def test_whole_distribution_is_sampled_by_default(make_transformer):
    model = make_transformer(codebook_size=128)
    model.lm_head.weight.data *= 0.01  # every code about as likely as any other
    prompt = torch.full((3000, 1), 128)
    sampled = model.generate(prompt, do_sample=True, max_new_tokens=1, generator=seeded())[:, 1]
    assert len(sampled.unique()) == 128
    assert len(stream(model, [0] * 3000, num_tokens=1, generator=seeded()).unique()) == 128


def test_sampling_depends_on_the_codes_before(tiny_transformer):
    codes = stream(tiny_transformer, [1] * 8, top_k=2, guidance_scale=(1.0, 4.0), generator=seeded())
    for row in codes.tolist():
        for i, code in enumerate(row):
            assert code in guided_logits(tiny_transformer, 1, row[:i], (1.0, 4.0)).topk(2).indices
