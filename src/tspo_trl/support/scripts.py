"""Classes of characters, for the brackets of a regular expression of the package `regex`."""

#: Characters of words: letters, their marks, and digits.
LETTERS = r"\p{L}\p{M}\p{N}"
#: Characters of scripts without spaces between words: Chinese, Japanese, Thai, Lao, Khmer and Burmese.
SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー"
