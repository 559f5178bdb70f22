"""How many texts the 16-bit model writes for calibration rows of its own, and how they become rows."""

from dataclasses import dataclass

SHORT = 65  # tokens of a text whose rows come beside others': many short texts differ more than a few long ones
AT_ONCE = 32  # texts that are sampled together; each takes several rows of logits


@dataclass(frozen=True)
class OwnRows:
    """Calibration rows [rows, seq_len] that the model writes: texts of `text_len` tokens, joined and cut.

    seq_len and text_len count the BOS, with which every row and every text begins.
    """

    rows: int
    seq_len: int
    text_len: int

    @property
    def texts(self) -> int:
        """How many texts fill the rows."""
        return -(-self.rows * (self.seq_len - 1) // (self.text_len - 1))

    @property
    def at_once(self) -> int:
        """How many of them are sampled together."""
        return min(self.texts, AT_ONCE)

    @property
    def steps(self) -> int:
        """How often a token of each of these texts is sampled."""
        return -(-self.texts // AT_ONCE) * (self.text_len - 1)

    @property
    def tokens(self) -> int:
        """How many tokens all texts have."""
        return self.texts * self.text_len
