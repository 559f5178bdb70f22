"""The licences that Google releases Gemma models under: facts, not advice, each with its source."""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_awq_cli.models.gemma.families import family_of


@dataclass(frozen=True)
class Terms:
    """A licence that Google releases Gemma models under."""

    id: str  # as the hub's card metadata writes it; for a licence that the hub has no id of, as `license_name`
    title: str
    subject: str  # what Google calls the models that are under it
    url: str
    text: str | None  # the file in publish/licences with its full text; None: whoever publishes gives it
    copy_name: str  # name of that file in a repository
    known_as: tuple[str, ...]  # glob patterns of files that may already be a copy of it
    opening: str  # words that identify its text
    sentence: str = ""  # what the `Notice` file must say, if anything
    restrictions: str = ""  # URL of the policy that restricts the use, if there is one
    on_hub: bool = True  # whether the hub has an id of its own for it


GEMMA_TERMS = Terms(
    id="gemma",
    title="Gemma Terms of Use",
    subject="Gemma",
    url="https://ai.google.dev/gemma/terms",
    text="gemma-terms-of-use.md",
    copy_name="GEMMA_TERMS_OF_USE.md",
    known_as=("*TERMS*",),
    opening="Gemma Terms of Use",
    # Section 3.1, fourth condition
    sentence="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    restrictions="https://ai.google.dev/gemma/prohibited_use_policy",
)
APACHE = Terms(
    id="apache-2.0",
    title="Apache License 2.0",
    subject="Gemma",
    url="https://www.apache.org/licenses/LICENSE-2.0",
    text="apache-2.0.txt",
    copy_name="LICENSE",
    known_as=("LICENSE*",),
    opening="Apache License",
)
# MedGemma and TxGemma: Gemmas by their config, and under these terms where their own card says so. The text has changed
# since its first edition, and none that is known to be the present one is held here.
HAI_DEF = Terms(
    id="health-ai-developer-foundations",
    title="Health AI Developer Foundations Terms of Use",
    subject="HAI-DEF",
    url="https://developers.google.com/health-ai-developer-foundations/terms",
    text=None,
    copy_name="HAI_DEF_TERMS_OF_USE.md",
    known_as=("*TERMS*", "LICENSE*"),
    opening="Health AI Developer Foundations Terms of Use",
    # Section 3.1, which also asks for a copy of the terms and for the restrictions of Section 3.2 to be passed on
    sentence="HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use found at "
    "https://developers.google.com/health-ai-developer-foundations/terms",
    restrictions="https://developers.google.com/health-ai-developer-foundations/prohibited-use-policy",
    on_hub=False,
)

# By licence key: the hub's id of the licence, or its `license_name`.
LICENCES: Mapping[str, Terms] = {terms.id: terms for terms in (GEMMA_TERMS, APACHE, HAI_DEF)}


def terms_of(model_type: str) -> Terms:
    """Return the terms of a family's models; raises for an unknown one."""
    return LICENCES[family_of(model_type).licence]
