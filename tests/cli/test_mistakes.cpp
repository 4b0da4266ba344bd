// Fifty mistakes of a new user: each is one line on stderr that says what, where and how to mend
// it, with the exit code of docs/formats.md, and leaves nothing half done.
#include <sys/stat.h>

#include <fstream>
#include <sstream>

#include "catch.h"
#include "cli/program.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

struct Mistake {
  std::string words;  // @ is the folder of the files below
  int code;
  std::vector<std::string> says;  // what, where, how to mend it
};

const std::vector<Mistake> kMistakes = {
    // ---- the command line
    {"", 2, {"hgrn: give a command: train, eval", "hgrn --help"}},
    {"trian", 2, {"hgrn trian: unknown command", "did you mean train?"}},
    {"--verson", 2, {"hgrn: unknown flag --verson", "did you mean --version?"}},
    {"train", 2, {"hgrn train: --config is required", "hgrn train --help"}},
    {"train --config", 2, {"hgrn train: --config needs a value"}},
    {"train --confg @/c.json", 2, {"unknown flag --confg", "did you mean --config?"}},
    {"train --config @/c.json --device gpu",
     2,
     {"--device: \"gpu\" is not one of auto, cpu, cuda"}},
    {"train --config @/c.json --steps -3", 2, {"--steps: -3 is out of range", "at least 0"}},
    {"train --config @/c.json --steps ten", 2, {"--steps", "ten"}},
    {"plan --config @/c.json --gpus 0", 2, {"--gpus: 0 is out of range", "above 0"}},
    {"generate --checkpoint @/run --prompt a --top-p 2", 2, {"--top-p: 2 is not between 0 and 1"}},
    {"generate --checkpoint @/run --promt a", 2, {"--promt", "did you mean --prompt?"}},
    {"generate --checkpoint @/run --prompt a --prompts @/text", 2, {"--prompt TEXT or --prompts"}},
    {"eval --checkpoint @/run", 2, {"--data SHARDS, --text FILE or --task NAME"}},
    {"eval --checkpoint @/run --text @/text --protocol block",
     2,
     {"\"block\" is not one of blocks, carry, lines", "did you mean blocks?"}},
    {"eval --checkpoint @/run --task piqa", 2, {"--task NAME and --task-data FILE go together"}},
    {"eval --checkpoint @/run --task piqua --task-data @/text", 2, {"did you mean piqa?"}},
    {"tokenize @/text", 2, {"--tokenizer is required"}},
    {"tokenize --tokenizer byte --jobs 0 @/text", 2, {"--jobs: 0 is not between 1 and 1024"}},
    {"launch", 2, {"give the command to start after --"}},
    {"launch -- eval", 2, {"for example -- train --config FILE"}},
    {"launch --nnodes 2 -- train --config @/c.json", 2, {"2 machines need --master-addr"}},
    // ---- the config
    {"train --config @/nosuch.json", 3, {"@/nosuch.json: cannot open", "configs/quickstart.json"}},
    {"train --config @", 3, {"@: is a folder", "give the config file"}},
    {"train --config @/broken.json", 2, {"@/broken.json: not valid JSON", "line 2", "correct"}},
    {"train --config @/c.json --set data.seqlen=8", 2, {"data.seqlen: unknown key", "seq_len?"}},
    {"train --config @/c.json --set lr=1", 2, {"--set lr: the key needs its section", "optim.lr"}},
    {"train --config @/c.json --set optim.lr", 2, {"expected KEY=VALUE", "--set optim.lr=1e-3"}},
    {"train --config @/c.json --set optim.lr=fast", 2, {"@/c.json:optim.lr: expected a number"}},
    {"train --config @/c.json --set optim.lr=-1",
     2,
     {"optim.lr: -1 is out of range", "at least 0"}},
    {"train --config @/c.json --set optim.schedule=cosin", 2, {"did you mean cosine?"}},
    {"train --config @/c.json --set train.precision=fp16", 2, {"is not one of bf16, fp32"}},
    {"train --config @/c.json --set model.mixer=mamba", 2, {"no mixer \"mamba\"", "hgru2"}},
    {"train --config @/c.json --set model.hidden_size=17",
     2,
     {"model.hidden_size: 17 is not a multiple of expand_ratio 8", "make hidden_size 24"}},
    {"train --config @/c.json --set train.global_batch=5",
     2,
     {"train.global_batch: 5 is not a multiple", "the nearest that is: 4"}},
    {"train --config @/c.json --set model.vocab_size=200",
     2,
     {"model.vocab_size: 200 is smaller than the tokenizer's 257", "raise it"}},
    {"train --config @/c.json --set data.reset_at_eos=true --set data.tokenizer=",
     2,
     {"no end-of-text token is known", "set model.eos_token_id or data.tokenizer"}},
    // ---- data
    {"train --config @/c.json --set data.train=@/x_*.bin",
     3,
     {"no file matches '@/x_*.bin'", "hgrn tokenize"}},
    {"train --config @/c.json --set data.train=@/text",
     3,
     {"@/text: magic", "not a token shard's", "hgrn tokenize"}},
    {"train --config @/c.json --set data.train=@/short.bin",
     3,
     {"@/short.bin: the header counts", "truncated", "copy it again"}},
    {"train --config @/c.json --set data.train=@/large.bin", 3, {"@/large.bin", "9999", "257"}},
    {"train --config @/c.json --set data.seq_len=100000",
     3,
     {"hold no sequence", "lower data.seq_len"}},
    {"train --config @/c.json --set data.valid=@/v_*.bin --set train.eval_every=1",
     3,
     {"data.valid: no file matches"}},
    {"train --config @/c.json --set data.tokenizer=gpt2",
     3,
     {"tokenizer 'gpt2': no such file", "or 'byte'"}},
    {"tokenize --tokenizer byte @/nosuch", 3, {"cannot open @/nosuch", "check the path"}},
    {"tokenize --tokenizer byte @/empty", 3, {"@/empty is a folder", "name the files in it"}},
    {"tokenize --tokenizer @/other.json @/text", 3, {"@/other.json: model is missing", "'byte'"}},
    {"eval --checkpoint @/run --text @/zero", 3, {"@/zero: there is no token to score"}},
    {"eval --checkpoint @/run --task piqa --task-data @/other.json",
     3,
     {"@/other.json:1: no field \"query\"", "\"choices\""}},
    // ---- runs and checkpoints
    {"train --config @/c.json --out @/run --set optim.lr=1",
     2,
     {"optim.lr: differs from the run in @/run", "restore the value"}},
    {"train --config @/c.json --out @/text", 1, {"cannot make folder @/text", "another --out"}},
    {"train --config @/c.json --resume @/nosuch", 3, {"@/nosuch", "not a complete checkpoint"}},
    {"train --config @/c.json --init-from @/empty", 3, {"@/empty/config.json", "check the path"}},
    {"train --config @/c.json --out @/damaged --set train.steps=6",
     3,
     {"model.safetensors is damaged", "restore one, or start anew"}},
    {"eval --checkpoint @/nosuch --text @/text",
     3,
     {"@/nosuch: no such folder", "give a checkpoint"}},
    {"eval --checkpoint @/empty --text @/text", 3, {"@/empty/config.json", "check the path"}},
    {"inspect @/nosuch", 3, {"@/nosuch: no such file or folder", "check the path"}},
    {"inspect @/text", 3, {"@/text: not a kind of file", "give a shard"}},
};

std::vector<std::string> words_of(const std::string& text, const std::string& folder) {
  std::vector<std::string> words;
  std::istringstream in(text);
  for (std::string word; in >> word;) {
    for (size_t at; (at = word.find('@')) != std::string::npos;) word.replace(at, 1, folder);
    words.push_back(word);
  }
  return words;
}

void write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

// The files that the mistakes are made with, and a run of two steps.
void prepare(const TempFolder& tmp) {
  std::string text;
  for (int i = 0; i < 400; ++i) text += "A line of text, number " + std::to_string(i) + ".\n";
  write(tmp / "text", text);
  write(tmp / "zero", "");
  write(tmp / "other.json", "{\"a\": 1}\n");
  write(tmp / "broken.json", "{\"model\": {\n");
  ::mkdir((tmp / "empty").c_str(), 0755);
  write(
      tmp / "c.json",
      R"({"model": {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8,
             "intermediate_size": 24},
            "data": {"train": ")" +
          (tmp / "t_*.bin") + R"(", "tokenizer": "byte", "seq_len": 32},
            "optim": {"warmup_steps": 2},
            "train": {"steps": 2, "global_batch": 4, "micro_batch": 2, "precision": "fp32",
             "eval_every": 0}})");
  REQUIRE(Program(tmp, {"tokenize", "--tokenizer", "byte", "--out", tmp / "t", tmp / "text"})
              .wait()
              .code == 0);
  const std::string shard = slurp(tmp / "t_000000.bin");
  write(tmp / "short.bin", shard.substr(0, 5000));
  std::string large = shard;
  for (size_t at = 1024; at + 1 < large.size(); at += 2) large[at] = '\x0f', large[at + 1] = '\x27';
  write(tmp / "large.bin", large);  // every token is 9999
  for (const char* run : {"run", "damaged"})
    REQUIRE(
        Program(tmp, {"train", "--config", tmp / "c.json", "--out", tmp / run, "--device", "cpu"})
            .wait()
            .code == 0);
  const std::string weights = tmp / "damaged/checkpoints/step-00000002/model.safetensors";
  std::string bytes = slurp(weights);
  bytes[bytes.size() / 2] = char(~bytes[bytes.size() / 2]);
  write(weights, bytes);
}

}  // namespace

TEST_CASE("mistakes: each gets one line that says what, where and how to mend it", "[cli]") {
  const TempFolder tmp;
  prepare(tmp);
  const std::string folder = tmp / ".";
  const std::string base = folder.substr(0, folder.size() - 2);
  CHECK(kMistakes.size() >= 50);
  for (const Mistake& m : kMistakes) {
    std::vector<std::string> words = words_of(m.words, base);
    const bool trains = m.words.rfind("train --config @", 0) == 0;
    if (trains && m.words.find("--out") == std::string::npos) {
      words.push_back("--out");
      words.push_back(tmp / "new");
    }
    if (trains && m.words.find("--device") == std::string::npos) {
      words.push_back("--device");
      words.push_back("cpu");
    }
    const Ended e = Program(tmp, words, {{"OMP_NUM_THREADS", "1"}}).wait();
    INFO("hgrn " << m.words << "\n" << e.err);
    CHECK(e.code == m.code);
    CHECK(e.errors() == 1);
    for (std::string part : m.says) {
      for (size_t at; (at = part.find('@')) != std::string::npos;) part.replace(at, 1, base);
      INFO(part);
      CHECK(e.says(part));
    }
    const size_t line = e.err.find("error: ");
    if (line != std::string::npos) {
      CHECK(e.err.find('\n', line) == e.err.size() - 1);  // the last line, and one alone
      CHECK(e.err.size() - line < 420);
    }
  }
}
