"""A tokenizer of a few words, and a zero-shot task in them: which of two endings is likelier."""

import json

WORDS = [
    "<unk>", "<|endoftext|>", "the", "a", "cat", "dog", "bird", "sat", "ran", "slept", "on",
    "under", "mat", "tree", "near", "red", "old",
]  # fmt: skip


def items(*who):
    """Documents: who did what, on the mat or under a tree."""
    made = [(one, did) for one in who for did in ("sat", "ran", "slept")]
    return [
        {"text": f"the {one} {did}", "choices": ["on the mat", "under a tree"], "answer": i % 2}
        for i, (one, did) in enumerate(made)
    ]


def save_tokenizer(folder):
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def save_task(folder, data, documents) -> None:
    """The task "toy" as folder/toy.yaml, of documents kept in the file `data`."""
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    folder.mkdir()
    (folder / "toy.yaml").write_text(f"""
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
