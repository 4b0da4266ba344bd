#!/usr/bin/env bash
# WikiText-103 as configs/wikitext103_44m.json reads it: fetches the authors' raw archive and GPT-2's
# BPE, checks their SHA-256, and makes data/wikitext103_{train,valid,test}_*.bin: each line stripped,
# one end-of-text token after it.
# usage: scripts/get_wikitext103.sh [--out DIR] [--tokenizer DIR] [--from DIR] [--jobs J]
#   --out DIR        where the shards go (default: data); downloads go to DIR/download
#   --tokenizer DIR  a folder with GPT-2's encoder.json and vocab.bpe (or vocab.json and merges.txt, or
#                    its tokenizer.json), instead of fetching them
#   --from DIR       fetch no text: take what is there of DIR/wiki.{train,valid,test}.raw, or
#                    DIR/wikitext-103-raw-v1.zip
# Needs build/hgrn (or HGRN=path), curl, unzip. What is there and right is not fetched again.
# WikiText-103 (Merity et al. 2016, arXiv 1609.07843) is under CC BY-SA; GPT-2's files under MIT.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."

archive=wikitext-103-raw-v1.zip
archive_url=https://wikitext.smerity.com/$archive
archive_bytes=191984949
bpe_url=https://openaipublic.blob.core.windows.net/gpt-2/encodings/main
declare -A sha256=(
  [$archive]=91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794
  [wiki.valid.raw]=4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7
  [wiki.test.raw]=173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08
  [encoder.json]=196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
  [vocab.bpe]=1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5)
# GPT-2 tokens with one end-of-text a line; with none they are 249,887 and 286,221.
declare -A tokens=([valid]=246403 [test]=282211)

out=data tokenizer="" from="" jobs=$(nproc)
hgrn=${HGRN:-build/hgrn}
fail() { local code=$1; shift; echo "get_wikitext103: $*" >&2; exit "$code"; }
while [ $# -gt 0 ]; do
  case $1 in
    --out | --tokenizer | --from | --jobs)
      [ $# -ge 2 ] || fail 2 "$1 needs a value; see the head of scripts/get_wikitext103.sh"
      value=$2
      [ "$1" = --jobs ] || [ "${value#/}" != "$value" ] || value=$caller/$value
      declare "${1#--}=$value"
      shift 2 ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' scripts/get_wikitext103.sh; exit 0 ;;
    *) fail 2 "unknown argument $1; known are --out, --tokenizer, --from and --jobs" ;;
  esac
done
[ -x "$hgrn" ] || fail 2 "$hgrn is missing; build it first: cmake --preset release && cmake --build --preset release"
work=$out/download
bar=--progress-bar
[ -t 2 ] || bar=--silent

is_right() {  # FILE NAME: whether it has the SHA-256 of NAME
  [ -f "$1" ] && [ "$(sha256sum <"$1" | cut -d' ' -f1)" = "${sha256[$2]}" ]
}

# The file appears under its name only when it is whole and right; an interrupted one goes on.
fetch() {  # URL NAME WHAT-ELSE-TO-DO
  local url=$1 to=$work/$2 code=0
  is_right "$to" "$2" && return
  command -v curl >/dev/null || fail 1 "curl is missing: apt-get install curl"
  echo "fetching $url" >&2
  mkdir -p "$work"
  curl --fail --location --connect-timeout 20 --retry 2 --continue-at - $bar --output "$to.part" "$url" || code=$?
  case $code in
    0) ;;
    5 | 6 | 7 | 28 | 35)
      fail 1 "cannot reach $(cut -d/ -f3 <<<"$url") (curl: exit $code): is there internet here? $3" ;;
    33 | 36) rm -f "$to.part"; fail 1 "the server does not continue a download; run this again to start anew" ;;
    *) fail 1 "fetching $url failed (curl: exit $code); run this again to go on. $3" ;;
  esac
  if ! is_right "$to.part" "$2"; then
    local size; size=$(stat -c %s "$to.part")
    rm -f "$to.part"
    fail 3 "$2: $size bytes came, whose SHA-256 is not ${sha256[$2]}: not the file that was published; try again. $3"
  fi
  mv "$to.part" "$to"
}

# ---- GPT-2's BPE
if [ -z "$tokenizer" ]; then
  other="Or name a folder that has GPT-2's files: --tokenizer DIR."
  fetch $bpe_url/encoder.json encoder.json "$other"
  fetch $bpe_url/vocab.bpe vocab.bpe "$other"
  tokenizer=$out/gpt2
  mkdir -p "$tokenizer"
  cp "$work/encoder.json" "$work/vocab.bpe" "$tokenizer/"
fi
$hgrn inspect "$tokenizer" | grep -q 'vocabulary 50257, end of text 50256' ||
  fail 3 "$tokenizer is not GPT-2's tokenizer (50,257 tokens, the last of them end-of-text); see: $hgrn inspect $tokenizer"

# ---- the text
texts=$from
if [ -z "$from" ]; then
  fetch $archive_url $archive "Or fetch $archive_url ($archive_bytes bytes) elsewhere, put it into a folder and name that: --from DIR."
  from=$work
fi
if [ -f "$from/$archive" ] && [ ! -f "$from/wiki.valid.raw" ]; then
  is_right "$from/$archive" "$archive" ||
    fail 3 "$from/$archive: its SHA-256 is not ${sha256[$archive]}; it must be $archive_bytes bytes; fetch it again"
  command -v unzip >/dev/null || fail 1 "unzip is missing: apt-get install unzip"
  texts=$work/wikitext-103-raw
  mkdir -p "$work"
  unzip -q -o -d "$work" "$from/$archive"
fi

made=()
for set in train valid test; do
  file=$texts/wiki.$set.raw
  [ -f "$file" ] || { echo "no $file: no $set shards" >&2; continue; }
  if [ -n "${sha256[wiki.$set.raw]:-}" ]; then
    is_right "$file" "wiki.$set.raw" ||
      fail 3 "$file is not WikiText's (SHA-256 ${sha256[wiki.$set.raw]}); numbers made with it compare with no others"
  fi
  "$hgrn" tokenize --tokenizer "$tokenizer" --line-end-token --jobs "$jobs" --out "$out/wikitext103_$set" "$file"
  counted=$("$hgrn" inspect "$out/wikitext103_$set.json" | sed -n 's/^  all: \([0-9]*\) tokens.*/\1/p')
  [ -z "${tokens[$set]:-}" ] || [ "$counted" = "${tokens[$set]}" ] ||
    fail 3 "$set: $counted tokens, not ${tokens[$set]}: $tokenizer is not GPT-2's tokenizer"
  echo "$set: $counted tokens, one end-of-text a line among them" >&2
  made+=("$set")
done
[ ${#made[@]} -gt 0 ] || fail 3 "$from: neither wiki.train.raw, wiki.valid.raw, wiki.test.raw nor $archive is there"

where="" have=" ${made[*]} "
[ "$out" = data ] || where=" --set data.train='$out/wikitext103_train_*.bin' --set data.valid='$out/wikitext103_valid_*.bin'"
[[ $have != *" train "* ]] ||
  echo "Train:    $hgrn train --config configs/wikitext103_44m.json --set data.tokenizer=$tokenizer$where" >&2
[[ $have != *" test "* ]] ||
  echo "Evaluate: $hgrn eval --checkpoint runs/wikitext103_44m --text $texts/wiki.test.raw --line-end-token --seq-len 512" >&2
