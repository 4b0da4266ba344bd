#!/usr/bin/env python3
"""Checks the Markdown pages of the repository: links, paths of the tree, and the commands that they show.

usage: tools/check_docs.py [--build DIR] [--links] [--verbose] [PAGE ...]
       tools/check_docs.py --messages      messages that docs/troubleshooting.md does not find yet

Commands stand in blocks marked `console`, in lines that begin with "$ "; the other lines are what they
print. The line before such a block says what becomes of it:

  <!-- run -->                        exit code 0, and every printed line occurs in the output
  <!-- run: exit 75 -->               another code of the block's last command
  <!-- run: any output -->            lines are not compared; goes with a code: exit 2, any output
  <!-- run if: COMMAND -->            as run, where COMMAND succeeds; else skipped with a message
  <!-- not run: REASON -->

A page's commands run in order in a copy of the tree of its own, in which build/ is the given build;
HGRN_PYTHON names a python3 with packages that some need. <!-- file: NAME --> before any other block
writes its text there. Lines are compared without time of day, numbers and spacing; "..." stands for
anything. A command outside of such a block is an error.
"""
import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

COMMAND = re.compile(
    r"^\s*([A-Z_]+=\S+ )*(\$ |\./|scripts/\w|build/hgrn|hgrn [a-z]+ |cmake |ctest |torchrun |mpirun |srun |sbatch |"
    r"python3 |pip |apt-get |git clone|docker |sudo )")
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?([eE][-+]?\d+)?")
TIME_OF_DAY = re.compile(r"(^|(?<=\] ))\d\d:\d\d:\d\d ")
SECONDS = 60  # a command


class Block:
    def __init__(self, page, line, language, mark, lines):
        self.page, self.line, self.language, self.mark, self.lines = page, line, language, mark, lines

    def where(self, offset=0):
        return f"{self.page}:{self.line + offset}"

    def commands(self):
        """[(line number, command, printed lines)]"""
        out = []
        for i, text in enumerate(self.lines):
            if out and out[-1][1].endswith("\\"):
                out[-1][1] += "\n" + text
            elif text.startswith("$ "):
                out.append([self.line + 1 + i, text[2:], []])
            elif out:
                out[-1][2].append(text)
        return out


def blocks_of(page, text):
    """Fenced and indented blocks with the comment before them; the page without them."""
    blocks, rest = [], []
    lines = text.split("\n")
    i, mark = 0, ""
    while i < len(lines):
        line = lines[i]
        fence = re.match(r"^\s*```(\w*)", line)
        comment = re.match(r"^\s*<!--\s*(.*?)\s*-->\s*$", line)
        if fence:
            start, body = i, []
            i += 1
            while i < len(lines) and not lines[i].strip().startswith("```"):
                body.append(lines[i])
                i += 1
            blocks.append(Block(page, start + 1, fence.group(1), mark, body))
            mark = ""
        elif line.startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            start = i
            while i + 1 < len(lines) and lines[i + 1].startswith("    "):
                i += 1
            blocks.append(Block(page, start, "indented", mark, lines[start:i + 1]))
            mark = ""
        elif comment:
            mark = comment.group(1)
        else:
            rest.append((i + 1, line))
            if line.strip():
                mark = ""
        i += 1
    return blocks, rest


# ---- links

def slug(heading):
    """As GitHub makes a heading's anchor."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    heading = re.sub(r"[`*]", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


def anchors_of(text, seen):
    _, rest = blocks_of("", text)
    for _, line in rest:
        m = re.match(r"^#+\s+(.*)", line)
        if m:
            name = slug(m.group(1))
            n = seen.get(name, 0)
            seen[name] = n + 1
            yield name if n == 0 else f"{name}-{n}"


def check_links(root, page, text):
    _, rest = blocks_of(page, text)
    for number, line in rest:
        line = re.sub(r"`[^`]*`", "", line)
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"^[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            full = os.path.normpath(os.path.join(root, os.path.dirname(page), path)) if path else os.path.join(root, page)
            if not os.path.exists(full):
                yield f"{page}:{number}: link to {target}: there is no such file"
            elif anchor and full.endswith(".md"):
                with open(full, encoding="utf-8") as f:
                    if anchor not in anchors_of(f.read(), {}):
                        yield f"{page}:{number}: link to {target}: no such heading there"


def check_paths(root, page, text):
    """A path of the tree between backticks exists; {a,b} and * as in a shell.
    <!-- imagined: NAME --> lets a page speak of files with NAME in them that do not."""
    _, rest = blocks_of(page, text)
    imagined = re.findall(r"<!-- imagined: (\S+) -->", text)
    for number, line in rest:
        for path in re.findall(r"`((?:src|kernels|scripts|tools|configs|tests|docs)/[\w./{},*-]+)`", line):
            braces = re.match(r"(.*)\{(.*)\}(.*)", path)
            names = [braces[1] + x + braces[3] for x in braces[2].split(",")] if braces else [path]
            for name in names:
                if "..." in name or any(x in name for x in imagined):
                    continue
                if not glob.glob(os.path.join(root, name)):
                    yield f"{page}:{number}: there is no {name}"


# ---- commands

def check_marks(blocks):
    for b in blocks:
        if b.language == "console":
            if not re.match(r"^(run$|run: |run if: \S|not run: \S)", b.mark):
                yield f"{b.where()}: a console block needs <!-- run --> or <!-- not run: REASON --> before it"
            if not b.commands():
                yield f"{b.where()}: a console block without a line that begins with '$ '"
        elif not b.mark.startswith("file: "):
            for i, line in enumerate(b.lines):
                if COMMAND.match(line):
                    yield f"{b.where(1 + i)}: a command belongs into a ```console block: {line.strip()}"
                    break


def plain(line):
    line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)
    return " ".join(TIME_OF_DAY.sub("", line).split())


def numberless(line):
    return NUMBER.sub("0", re.sub(r"\b[0-9a-f]{12,16}\b", "0", line))


def is_in(listed, printed):
    parts = [re.escape(numberless(p)).replace(r"\ ", r"\s*") for p in plain(listed).split("...")]
    form = re.compile(r".*".join(parts))
    return any(form.fullmatch(numberless(p)) for p in printed)


def run_block(b, folder, environment, verbose):
    """The errors of a block, and whether it ran."""
    mark = b.mark
    condition = re.match(r"^run if: (.*)$", mark)
    if condition:
        if subprocess.run(["bash", "-c", condition.group(1)], cwd=folder, env=environment,
                          capture_output=True).returncode != 0:
            print(f"{b.where()}: skipped, since this fails here: {condition.group(1)}")
            return [], False
    code = re.search(r"exit (\d+)", mark) if mark.startswith("run: ") else None
    wanted = int(code.group(1)) if code else 0
    compare = not (mark.startswith("run: ") and "any output" in mark)
    commands = b.commands()
    for i, (line, command, listed) in enumerate(commands):
        started = time.monotonic()
        try:
            p = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, timeout=SECONDS,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except subprocess.TimeoutExpired:
            return [f"{b.page}:{line}: more than {SECONDS} s: {command}"], True
        out = p.stdout.decode("utf-8", "replace")
        if verbose:
            print(f"{b.page}:{line}: {time.monotonic() - started:.1f} s  {command}\n{out}")
        expected = wanted if i == len(commands) - 1 else 0
        if p.returncode != expected:
            return [f"{b.page}:{line}: exit code {p.returncode}, not {expected}: {command}\n{out}"], True
        printed = [plain(x) for x in re.split(r"[\r\n]", out)]
        for text in listed:
            if compare and text.strip() and not is_in(text, printed):
                return [f"{b.page}:{line}: the output has no line like\n  {text}\nof {command}\n{out}"], True
    return [], True


def copy_tree(root, to, build):
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                           capture_output=True, check=True).stdout.decode().split("\0")
    for name in names:
        if name and os.path.isfile(os.path.join(root, name)):
            os.makedirs(os.path.dirname(os.path.join(to, name)), exist_ok=True)
            shutil.copy2(os.path.join(root, name), os.path.join(to, name))
    os.symlink(os.path.abspath(build), os.path.join(to, "build"))


def run_page(root, build, page, blocks, verbose):
    errors, ran = [], 0
    environment = dict(os.environ, OMP_NUM_THREADS="1", NO_COLOR="1")
    if "HGRN_PYTHON" in os.environ:  # one with the packages that some pages use, as .ci/run makes it
        environment["PATH"] = os.path.dirname(os.environ["HGRN_PYTHON"]) + ":" + os.environ["PATH"]
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(root, folder, build)
        for b in blocks:
            if b.mark.startswith("file: "):
                path = os.path.join(folder, b.mark[6:])
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w", encoding="utf-8") as f:
                    f.write("\n".join(b.lines) + "\n")
            elif b.language == "console" and b.mark.startswith("run"):
                failed, did = run_block(b, folder, environment, verbose)
                errors += failed
                ran += did
                if failed:
                    break  # what follows builds on it
    return errors, ran


# ---- messages

def messages_without_a_row(root):
    """[(file, message)] of exit codes 2, 3 and 4 that no quotation of docs/troubleshooting.md finds.
    (That every quotation is a message is tests/arch/test_docs.cpp.)"""
    quotations, table = [], False
    with open(os.path.join(root, "docs/troubleshooting.md"), encoding="utf-8") as f:
        for line in f:
            table = line.startswith("| Message") or (table and line.startswith("|"))
            if table:
                quotations += [q.split("...") for q in re.findall(r"`([^`]+)`", line.split(" | ")[0])]

    def finds(parts, message):
        at = 0
        for part in parts:
            at = message.find(part, at)
            if at < 0:
                return False
            at += len(part)
        return True

    for path in sorted(glob.glob(os.path.join(root, "src/*/*.cpp")) + glob.glob(os.path.join(root, "kernels/*/*.c*"))):
        with open(path, encoding="utf-8") as f:
            text = re.sub(r'"\s*\n\s*"', "", f.read())
        for m in re.finditer(r'Exit::(?:usage|data|nonfinite),\s*(?:fmt::format\()?"((?:[^"\\]|\\.)*)"', text):
            message = m.group(1).replace('\\"', '"').replace("{{", "{")
            if not any(finds(parts, message) for parts in quotations):
                yield os.path.relpath(path, root), message


# ---- itself

def self_test():
    """Each kind of mistake is found; a right page passes."""
    good = ("# A b\n[x](#a-b)\n<!-- file: a/b.txt -->\n```\nbuild/hgrn one\n```\n<!-- run: exit 3 -->\n```console\n"
            "$ cat a/b.txt\n... one\n$ echo '10:11:12 step 7  loss 1.5e-3'; exit 3\nstep 9 loss 2.0\n```\n")
    bad = {
        "needs <!-- run -->": "```console\n$ true\n```\n",
        "belongs into": "```\nbuild/hgrn train\n```\n",
        "belongs into a": "text\n\n    scripts/x.sh\n",
        "without a line": "<!-- run -->\n```console\ntrue\n```\n",
        "exit code 1, not 0": "<!-- run -->\n```console\n$ false\n```\n",
        "exit code 0, not 2": "<!-- run: exit 2 -->\n```console\n$ true\n```\n",
        "no line like": "<!-- run -->\n```console\n$ echo loss 1\nnorm 1\n```\n",
        "no such file": "[x](nowhere.md)\n",
        "no such heading": "# A\n[x](#b)\n",
        "there is no": "see `src/nowhere.cpp`\n",
    }
    with tempfile.TemporaryDirectory() as root:
        subprocess.run(["git", "init", "-q", root], check=True)

        def errors_of(text):
            with open(os.path.join(root, "p.md"), "w", encoding="utf-8") as f:
                f.write(text)
            blocks, _ = blocks_of("p.md", text)
            found = [*check_links(root, "p.md", text), *check_paths(root, "p.md", text), *check_marks(blocks)]
            return found or run_page(root, root, "p.md", blocks, False)[0]

        if errors_of(good):
            sys.exit(f"check_docs: a right page fails: {errors_of(good)}")
        for words, text in bad.items():
            if not any(words in e for e in errors_of(text)):
                sys.exit(f"check_docs: not found: {words}\n{text}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build")
    parser.add_argument("--links", action="store_true", help="links and marks alone; runs nothing")
    parser.add_argument("--verbose", action="store_true", help="what each command prints, and its time")
    parser.add_argument("--messages", action="store_true",
                        help="list the messages that docs/troubleshooting.md does not find yet")
    parser.add_argument("pages", nargs="*")
    args = parser.parse_args()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if args.messages:
        for path, message in messages_without_a_row(root):
            print(f"{path}: {message}")
        return
    self_test()
    pages = args.pages or sorted(subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"], cwd=root, capture_output=True,
        check=True).stdout.decode().split())
    errors, ran, left_out = [], 0, 0
    for page in pages:
        with open(os.path.join(root, page), encoding="utf-8") as f:
            text = f.read()
        blocks, _ = blocks_of(page, text)
        found = [*check_links(root, page, text), *check_paths(root, page, text), *check_marks(blocks)]
        left_out += sum(b.mark.startswith("not run") for b in blocks)
        if not found and not args.links and any(b.mark.startswith("run") for b in blocks):
            started = time.monotonic()
            found, n = run_page(root, os.path.join(root, args.build), page, blocks, args.verbose)
            ran += n
            print(f"{page}: {n} blocks of commands, {time.monotonic() - started:.1f} s")
        errors += found
    for e in errors:
        print(e, file=sys.stderr)
    print(f"{len(pages)} pages; blocks of commands: {ran} run, {left_out} not run, as they say; "
          f"{len(errors)} errors")
    sys.exit(1 if errors else 0)


main()
