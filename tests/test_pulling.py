"""Which files ``pull`` takes of what repositories hold."""

from __future__ import annotations

import pytest

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.pulling import choose, quantisation, read_name


def taken(names: list[str], tag: str = "") -> tuple[str, ...]:
    choice = choose("o/r", names, tag)
    return (*choice.lm, choice.mmproj)


PUBLISHED = {
    "ggml-org": (
        ["SmolVLM-500M-Instruct-Q8_0.gguf", "SmolVLM-500M-Instruct-f16.gguf", "mmproj-SmolVLM-500M-Instruct-Q8_0.gguf",
         "mmproj-SmolVLM-500M-Instruct-f16.gguf"],
        ("SmolVLM-500M-Instruct-Q8_0.gguf", "mmproj-SmolVLM-500M-Instruct-f16.gguf"),
    ),
    "legacy llava": (
        ["ggml-model-f16.gguf", "ggml-model-q4_k.gguf", "ggml-model-q5_k.gguf", "mmproj-model-f16.gguf"],
        ("ggml-model-q4_k.gguf", "mmproj-model-f16.gguf"),
    ),
    "dots, and the projector named behind the model": (
        ["llava-v1.6.Q3_K.gguf", "llava-v1.6.Q4_K_M.gguf", "llava-v1.6.Q4_K_S.gguf", "llava-v1.6.mmproj-Q4_0.gguf",
         "llava-v1.6.mmproj-f16.gguf"],
        ("llava-v1.6.Q4_K_M.gguf", "llava-v1.6.mmproj-f16.gguf"),
    ),
    "unsloth": (
        ["BF16/Qwen2.5-VL-7B-BF16-00001-of-00002.gguf", "BF16/Qwen2.5-VL-7B-BF16-00002-of-00002.gguf",
         "Qwen2.5-VL-7B-IQ4_XS.gguf", "Qwen2.5-VL-7B-Q4_K_M.gguf", "Qwen2.5-VL-7B-UD-Q4_K_XL.gguf",
         "imatrix_unsloth.gguf", "mmproj-BF16.gguf", "mmproj-F32.gguf"],
        ("Qwen2.5-VL-7B-Q4_K_M.gguf", "mmproj-BF16.gguf"),
    ),
    "two names for one model, and drafts": (
        ["Model-7.6B-F16.gguf", "ggml-model-Q4_0.gguf", "mmproj-model-f16.gguf", "mtp-Model-Q4_K_M.gguf"],
        ("ggml-model-Q4_0.gguf", "mmproj-model-f16.gguf"),
    ),
    "no word of the weights": (["model.gguf", "mmproj.gguf"], ("model.gguf", "mmproj.gguf")),
    "fp16": (["m-fp16.gguf", "m-int4.gguf", "m-mmproj-fp16.gguf"], ("m-fp16.gguf", "m-mmproj-fp16.gguf")),
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_of_repositories_as_they_are_published_the_usual_files_are_taken(kind: str) -> None:
    names, expected = PUBLISHED[kind]
    assert taken([*names, "README.md", "config.json"]) == expected
    assert taken(names[::-1]) == expected


def test_a_tag_names_a_quantisation_in_any_case_or_a_file() -> None:
    names = PUBLISHED["unsloth"][0]
    assert taken(names, "q4_k_m")[0] == "Qwen2.5-VL-7B-Q4_K_M.gguf"
    assert taken(names, "IQ4_XS")[0] == "Qwen2.5-VL-7B-IQ4_XS.gguf"
    assert taken(names, "UD-Q4_K_XL")[0] == taken(names, "q4_k_xl")[0] == "Qwen2.5-VL-7B-UD-Q4_K_XL.gguf"
    both = tuple(name for name in names if name.startswith("BF16/"))
    for tag in ("BF16", both[0], "Qwen2.5-VL-7B-BF16-00002-of-00002.gguf"):
        assert taken(names, tag) == (*both, "mmproj-BF16.gguf")
    for tag in ("f16", "FP16"):
        for name in ("a-FP16.gguf", "a-f16.gguf"):
            assert taken([name, "a-Q4_0.gguf", "mmproj.gguf"], tag) == (name, "mmproj.gguf")


def test_the_reason_says_by_which_order_the_files_were_taken() -> None:
    reason = choose("o/r", PUBLISHED["ggml-org"][0]).reason
    assert reason == (
        "language model Q8_0, the first there is of Q4_K_M, Q4_K, Q4_K_S, Q4_0, Q5_K_M, Q6_K, Q8_0, F16, BF16, F32; "
        "mmproj F16, the first there is of F16, BF16, Q8_0, F32"
    )
    assert choose("o/r", ["m-Q4_0.gguf", "mmproj.gguf"], "Q4_0").reason == (
        "language model Q4_0, as named; mmproj the only one"
    )


def test_the_mmproj_is_that_of_the_models_folder_or_of_the_nearest_above_or_of_its_name() -> None:
    two = ["a/x-Q4_K_M.gguf", "a/mmproj-Q8_0.gguf", "b/y-Q8_0.gguf", "b/mmproj-f16.gguf"]
    assert taken(two) == ("a/x-Q4_K_M.gguf", "a/mmproj-Q8_0.gguf")
    assert taken(two, "Q8_0") == ("b/y-Q8_0.gguf", "b/mmproj-f16.gguf")
    above = ["v/Q4_K_M/x.gguf", "v/mmproj-f16.gguf", "mmproj-f16.gguf", "v/Q8_0/mmproj-f16.gguf"]
    assert taken(above) == ("v/Q4_K_M/x.gguf", "v/mmproj-f16.gguf")
    assert taken(["lm/x-Q4_K_M.gguf", "vision/mmproj-f16.gguf"])[1] == "vision/mmproj-f16.gguf"
    named = ["Seer-2B-Q4_K_M.gguf", "Seer-7B-Q8_0.gguf", "mmproj-Seer-2B-f16.gguf", "mmproj-Seer-7B-f16.gguf"]
    assert taken(named, "Q8_0") == ("Seer-7B-Q8_0.gguf", "mmproj-Seer-7B-f16.gguf")


def test_quantisations_are_read_off_names_not_out_of_words() -> None:
    for name, expected in {
        "a-Q4_0_4_8.gguf": "Q4_0_4_8", "TQ1_0/a.gguf": "TQ1_0", "a-MXFP4_MOE.gguf": "MXFP4_MOE", "a_q8_0.gguf": "Q8_0",
        "a-IQ2_XXS-00001-of-00002.gguf": "IQ2_XXS", "faq4-v2.gguf": "", "a-if16b.gguf": "", "Q8_0/a-Q4_0.gguf": "Q4_0",
    }.items():  # fmt: skip
        assert quantisation(name) == expected


REFUSED = [
    ([], "", "no language model, no GGUF file; name a repository with a GGUF"),
    (["mmproj-f16.gguf"], "", "no language model, only mmproj-f16.gguf"),
    (["a-Q4_0.gguf"], "", "no mmproj, and without one a model sees nothing"),
    (["a-Q4_0.gguf", "a-Q8_0.gguf", "mmproj.gguf"], "Q5_K_M", "no Q5_K_M; there is Q4_0, Q8_0"),
    (["a-Q4_0.gguf", "mmproj.gguf"], "b.gguf", "no language model b.gguf; there is a-Q4_0.gguf"),
    (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "mmproj.gguf"], "", "several models, a-Q4_K_M.gguf, b-Q4_K_M.gguf; name one, "
     "as in OWNER/NAME:a-Q4_K_M.gguf"),
    (["a-IQ2_M.gguf", "a-IQ3_M.gguf", "mmproj.gguf"], "", "name one of IQ2_M, IQ3_M behind a colon, as in "
     "OWNER/NAME:IQ2_M"),
    (["a-Q4_0-00001-of-00003.gguf", "a-Q4_0-00003-of-00003.gguf", "mmproj.gguf"], "", "a-Q4_0-00002-of-00003.gguf is "
     "missing, the model has 3 parts"),
    (["a-Q4_0.gguf", "mmproj-b-f16.gguf", "mmproj-c-f16.gguf"], "", "several mmproj files, mmproj-b-f16.gguf, "
     "mmproj-c-f16.gguf"),
    ([f"{n:02}-Q4_0.gguf" for n in range(15)] + ["mmproj.gguf"], "", "11-Q4_0.gguf and 3 more; name one"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "tag", "words"), REFUSED)
def test_what_cannot_be_chosen_is_refused_in_one_line_that_says_what_there_is(
    names: list[str], tag: str, words: str
) -> None:
    with pytest.raises(TokcompError) as refusal:
        choose("o/r", names, tag)
    assert str(refusal.value).startswith("o/r: ")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_repository_is_written_owner_slash_name_and_what_is_wanted_of_it() -> None:
    assert read_name("a-b/c.d_e:Q8_0") == ("a-b/c.d_e", "Q8_0")
    assert read_name("a/b:sub/x.gguf") == ("a/b", "sub/x.gguf")
    for text in ("a", "a/b/c", "https://huggingface.co/a/b", "a/b:", "a /b", "/b", "a/b\n"):
        with pytest.raises(UsageError):
            read_name(text)
