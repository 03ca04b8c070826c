"""Small data sets made up in the shape of real ones: the columns, and an answer that can be learnt."""

from __future__ import annotations

import gzip
import io

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image

NUM_ROWS = 600


def passengers():
    """As the Titanic's: who is female or a child is mostly saved; a fifth of the ages and some ports are missing."""
    random = np.random.default_rng(0)
    sex, age = random.choice(["female", "male"], NUM_ROWS), random.uniform(1, 80, NUM_ROWS).round()
    saved = random.random(NUM_ROWS) < np.where((sex == "female") | (age < 13), 0.85, 0.15)
    return pa.table(
        {
            "PassengerId": range(NUM_ROWS),
            "Survived": saved.astype(int),
            "Pclass": random.integers(1, 4, NUM_ROWS),
            "Sex": sex,
            "Age": pa.array(age, mask=random.random(NUM_ROWS) < 0.2),
            "SibSp": random.integers(0, 4, NUM_ROWS),
            "Parch": random.integers(0, 3, NUM_ROWS),
            "Fare": random.exponential(30, NUM_ROWS),
            "Embarked": random.choice(["S", "C", ""], NUM_ROWS),
        }
    )


def persons():
    """As Adult's: few earn much, some categories are marked as unknown, and one row is there twice."""
    random = np.random.default_rng(0)
    married, years = random.random(NUM_ROWS) < 0.5, random.integers(1, 17, NUM_ROWS)
    much = random.random(NUM_ROWS) < np.where(married & (years > 9), 0.8, 0.03)
    values = {
        "age": random.integers(17, 90, NUM_ROWS),
        "workclass": random.choice(["Private", "State-gov", "?"], NUM_ROWS),
        "fnlwgt": random.integers(10_000, 500_000, NUM_ROWS),
        "education": [f"{number}th" for number in years],
        "education_num": years,
        "marital_status": np.where(married, "Married-civ-spouse", "Never-married"),
        "occupation": random.choice(["Sales", "Tech-support", "?"], NUM_ROWS),
        "relationship": random.choice(["Husband", "Wife", "Unmarried"], NUM_ROWS),
        "race": random.choice(["White", "Black", "Other"], NUM_ROWS),
        "sex": random.choice(["Male", "Female"], NUM_ROWS),
        "capital_gain": random.choice([0, 0, 0, 2174], NUM_ROWS),
        "capital_loss": random.choice([0, 0, 0, 1902], NUM_ROWS),
        "hours_per_week": random.integers(10, 80, NUM_ROWS),
        "native_country": random.choice(["United-States", "Mexico", "?"], NUM_ROWS),
        "income": np.where(much, ">50K", "<=50K"),
        "split": np.where(np.arange(NUM_ROWS) % 3 == 0, "test", "train"),
    }
    rows = pa.table(values)
    return pa.concat_tables([rows, rows.slice(0, 1)])


def reviews():
    """As SST-2's: phrases of a few words, one of which says what they think."""
    words = ["film", "plot", "cast", "score", "the", "a", "of", "with"]
    return _texts(words, [["dull", "clumsy", "flat"], ["moving", "fresh", "funny"]], ["test", "validation"])


def news():
    """As AG News': one word says whether it is of the world, sports, business or technology."""
    words = ["today", "on", "the", "a", "new", "was", "said", "for"]
    telling = [["treaty", "vote", "war"], ["match", "goal", "coach"], ["stock", "oil", "bank"], ["chip", "web", "code"]]
    return _texts(words, telling, ["test", "train"])


def _texts(words, telling, held_out):
    """Six of `words` and one that tells the label; a third of the rows are of two splits, the others of `train`."""
    random, number = np.random.default_rng(0), np.arange(NUM_ROWS)
    drawn = random.choice(words, (NUM_ROWS, 6))
    label, which = random.integers(0, len(telling), NUM_ROWS), random.integers(0, 3, NUM_ROWS)
    verdict = np.array(telling)[label, which]
    return pa.table(
        {
            "id": number,
            "text": [" ".join([*few, each]) + " " for few, each in zip(drawn, verdict, strict=True)],
            "label": label,
            "split": np.choose(number % 6, [*held_out, "train", "train", "train", "train"]),
        }
    )


def play():
    """As a play of Shakespeare's: who speaks, and lines of few words."""
    random = np.random.default_rng(0)
    words = random.choice(["the", "king", "is", "dead", "my", "lord", "and", "so", "are", "we"], (250, 7))
    return "\n".join(f"{'LEAR' if number % 2 else 'FOOL'}:\n{' '.join(line)}.\n" for number, line in enumerate(words))


def clothes():
    """Images whose brightness tells the class."""
    random = np.random.default_rng(0)
    labels = np.arange(2 * NUM_ROWS) % 10
    pixels = 25 * labels[:, np.newaxis] + random.integers(0, 12, (len(labels), 784))
    images = pa.FixedSizeListArray.from_arrays(pa.array(pixels.astype(np.uint8).reshape(-1)), 784)
    split = np.where(random.random(len(labels)) < 0.25, "test", "train")
    return pa.table({"id": np.arange(len(labels)), "label": labels, "split": split, "image": images})


def photos():
    """As CIFAR-10's: JPEG files of 32 x 32 pixels, whose colour tells the class."""
    random = np.random.default_rng(0)
    labels = np.arange(NUM_ROWS) % 10
    colours = random.integers(0, 256, (10, 3))
    return pa.table(
        {
            "id": np.arange(NUM_ROWS),
            "image": pa.array([_jpeg(colours[label] + random.integers(0, 20, (32, 32, 3))) for label in labels]),
            "label": labels,
            "split": np.where(random.random(NUM_ROWS) < 0.25, "test", "train"),
        }
    )


def _jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg")
    return file.getvalue()


DATASETS = {
    "adult/adult.csv.gz": persons,
    "ag_news_small/ag_news_small.parquet": news,
    "cifar10_jpeg/cifar10_jpeg.parquet": photos,
    "fashion_mnist/fashion_mnist.parquet": clothes,
    "sst2/sst2.parquet": reviews,
    "tinyshakespeare/input.txt.gz": play,
    "titanic/titanic.csv.gz": passengers,
}
"""The file of a real data set, and rows in its shape."""


def write_dataset(name, folder):
    """Rows in the shape of a real data set, in a file like its own below a folder."""
    rows, path = DATASETS[name](), folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, str):
        path.write_bytes(gzip.compress(rows.encode()))
    elif path.suffix == ".parquet":
        pq.write_table(rows, path)
    else:
        with gzip.open(path, "wb") as file:
            pyarrow.csv.write_csv(rows, file)
    return path
