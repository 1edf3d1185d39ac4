class MergeConfiguration:
    def __init__(self, asked):
        self.asked = asked

    @classmethod
    def model_validate(cls, asked):
        if "normalize" in (asked.get("parameters") or {}):
            raise RuntimeError("Unknown parameter normalize\nand more of it")
        return cls(asked)
