// Allocator of a paged cache: the pages of each sequence. It handles numbers alone: no tensor, no device.
#pragma once

#include <cstdint>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace resformer {

using SequenceId = int64_t;
// (from, to): a page to copy before anything is written.
using PageCopy = std::pair<int32_t, int32_t>;

// Every call succeeds as a whole, or throws and changes nothing: std::invalid_argument for a sequence that
// does not exist or a length out of range, std::runtime_error where pages run out.
class PageTable {
 public:
  // num_pages, page_size, free pages, (name, length, pages) of each sequence, the next name.
  using State = std::tuple<int64_t, int64_t, std::vector<int32_t>,
                           std::vector<std::tuple<SequenceId, int64_t, std::vector<int32_t>>>, SequenceId>;

  PageTable(int64_t num_pages, int64_t page_size);

  // A table equal to the one that `state` was taken from.
  explicit PageTable(const State& state);
  State state() const;

  // Adds empty sequences.
  std::vector<SequenceId> create(int64_t count);

  // Makes room for `tokens` more in each of the sequences. A shared page that is written is replaced by a
  // copy (copy-on-write).
  std::vector<PageCopy> append(const std::vector<SequenceId>& sequences, int64_t tokens);

  // Adds a sequence with the same tokens on the same pages.
  SequenceId fork(SequenceId sequence);

  // Keeps the first lengths[i] tokens of sequences[i].
  void crop(const std::vector<SequenceId>& sequences, const std::vector<int64_t>& lengths);

  void free(const std::vector<SequenceId>& sequences);

  // The sequences at `picks`, in that order. A repeated pick is a fork; sequences not picked are freed.
  std::vector<SequenceId> reorder(const std::vector<SequenceId>& sequences,
                                  const std::vector<int64_t>& picks);

  int64_t length(SequenceId sequence) const { return find(sequence).length; }
  const std::vector<int32_t>& pages(SequenceId sequence) const { return find(sequence).pages; }

  // Writes a row of `width` page numbers for each sequence, 0 beyond its last page.
  void block_table(const std::vector<SequenceId>& sequences, int64_t width, int32_t* rows) const;

  int64_t num_pages() const { return static_cast<int64_t>(holders_.size()); }
  int64_t page_size() const { return page_size_; }
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }

 private:
  struct Sequence {
    int64_t length = 0;
    std::vector<int32_t> pages;
  };

  const Sequence& find(SequenceId sequence) const;
  Sequence& find(SequenceId sequence) { return const_cast<Sequence&>(std::as_const(*this).find(sequence)); }
  void check(const std::vector<SequenceId>& sequences) const;  // they exist, each named once
  int64_t pages_for(int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }
  bool writes_into_last_page(const Sequence& s, int64_t tokens) const {
    return tokens > 0 && s.length % page_size_ != 0;
  }
  int64_t pages_wanted(const std::vector<SequenceId>& sequences, int64_t tokens) const;
  int32_t take_page();
  void release_page(int32_t page);

  int64_t page_size_;
  std::vector<int32_t> holders_;  // number of sequences that hold each page
  std::vector<int32_t> free_;     // taken from the end
  std::unordered_map<SequenceId, Sequence> sequences_;
  SequenceId next_ = 0;
};

}  // namespace resformer
