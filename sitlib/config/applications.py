"""Configuration of the applications that are measured: which models, on how many images."""

from dataclasses import dataclass

from sitlib.config.strict import Strict, require, require_seed


@dataclass(frozen=True)
class ApplicationsConfig(Strict):
    """Models and images of the applications notebook. Samplers are those of the models' sections, but for what is named here."""

    class_generator: str  # class-conditional variant over the codes of a scale-causal tokenizer
    text_generator: str  # text-conditional, likewise
    baseline: str  # tokenizer variant beside which rates and other data sets are measured
    model_seed: int  # of both generators
    images: int  # held-out images that are upsampled and edited
    temperatures: list[float]  # of upsampling at the largest factor
    repeated: int  # images of which several samples are drawn
    samples: int  # that many
    previews: int  # of one prompt
    preview_prompts: int  # for which previews are judged
    rounds: int  # of timing
    kid_subset_size: int
    seed: int

    def __post_init__(self):
        require(self.images >= 2, f"images must be at least 2, it is {self.images}")
        require(
            1 <= self.repeated <= self.images,
            f"repeated must lie in 1 ... images = {self.images}, it is {self.repeated}",
        )
        for name in ("samples", "previews", "preview_prompts"):
            require(
                getattr(self, name) >= 2, f"{name} must be at least 2, it is {getattr(self, name)}"
            )
        require(self.rounds >= 1, f"rounds must be at least 1, it is {self.rounds}")
        require(
            len(self.temperatures) > 0 and min(self.temperatures) > 0,
            f"temperatures must be positive numbers, they are {self.temperatures}",
        )
        require(
            2 <= self.kid_subset_size <= self.images,
            f"kid_subset_size must lie in 2 ... images = {self.images}, it is {self.kid_subset_size}",
        )
        require_seed(self.seed)
        require_seed(self.model_seed, "model_seed")
