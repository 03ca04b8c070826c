"""scikit-learn's digits as a file: `python digits.py`."""

from pathlib import Path

from kdpipe.data.sources.digits import write_digits

if __name__ == "__main__":
    write_digits(Path(__file__).parent / "data" / "raw" / "digits.parquet")
