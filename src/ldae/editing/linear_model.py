"""A fitted linear predictor as plain arrays: what is stored, shipped and applied to another cohort.

    decision(x) = ((x - mean) / std) @ coef + intercept

A missing feature is set to its mean. The probability of a class is the logistic function of the decision.

A regression shrinks towards the mean: it predicts the young too old and the old too young. `bias` is the line
(intercept, slope) of out-of-fold predictions over true values in the training rows, and `unbiased` divides it out (Cole
et al. 2018, doi 10.1038/mp.2017.62). This needs no true value of the scan that is predicted.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ldae.utils.errors import UserError


@dataclass(frozen=True)
class LinearModel:
    """A linear predictor of one column of the table.

    Attributes:
        column: the column that it predicts.
        mean, std, coef: (D,) float64; D = 0 is a constant predictor.
        classes: (negative, positive), or None if it predicts a number.
        bias: (intercept, slope), see above; None without bias correction.
    """

    column: str
    mean: np.ndarray
    std: np.ndarray
    coef: np.ndarray
    intercept: float
    classes: tuple[str, str] | None = None
    bias: tuple[float, float] | None = None

    def decision(self, features: np.ndarray) -> np.ndarray:
        """Log-odds of the positive class, or the predicted number, (N,), of features (N, D).

        Raises:
            UserError: D is not the number of features that it was fitted on.
        """
        self.check_features(features.shape[1])
        features = np.asarray(features, np.float64)
        filled = np.where(np.isnan(features), self.mean, features)
        return ((filled - self.mean) / self.std) @ self.coef + self.intercept

    def check_features(self, count: int) -> None:
        """Refuse another number of features than D.

        Raises:
            UserError: `count` is not D.
        """
        if count != len(self.mean):
            raise UserError(
                f"the frozen predictor of {self.column!r} takes {len(self.mean)} features, the cohort has {count}; "
                "prepare the cohort with the same model and volume size"
            )

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Probability of the positive class, or the predicted number, (N,), of features (N, D)."""
        return self.from_decision(self.decision(features))

    def from_decision(self, decision: np.ndarray) -> np.ndarray:
        """Probability of the positive class of a decision (N,); a number is its own decision."""
        from scipy.special import expit

        return decision if self.classes is None else expit(decision)

    def unbiased(self, prediction: np.ndarray) -> np.ndarray:
        """Predictions (N,) with the line `bias` divided out; unchanged without bias correction."""
        return prediction if self.bias is None else (prediction - self.bias[0]) / self.bias[1]

    def slope_along(self, step: np.ndarray) -> float:
        """Change of the decision if the features move by `step` (D,); of a number, with the line `bias` divided out."""
        slope = float((self.coef / self.std) @ step)
        return slope if self.bias is None else slope / self.bias[1]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; floats read back exactly."""
        return {
            "column": self.column,
            "classes": None if self.classes is None else list(self.classes),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "coef": self.coef.tolist(),
            "intercept": self.intercept,
            "bias": None if self.bias is None else list(self.bias),
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "LinearModel":
        """The inverse of `to_dict`."""
        classes, bias = value["classes"], value.get("bias")
        return cls(
            column=value["column"],
            mean=np.asarray(value["mean"], np.float64),
            std=np.asarray(value["std"], np.float64),
            coef=np.asarray(value["coef"], np.float64),
            intercept=float(value["intercept"]),
            classes=None if classes is None else (classes[0], classes[1]),
            bias=None if bias is None else (bias[0], bias[1]),
        )
