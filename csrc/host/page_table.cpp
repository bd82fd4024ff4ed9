#include "host/page_table.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_set>

namespace resformer {

namespace {

std::string text(int64_t number) { return std::to_string(number); }

}  // namespace

PageTable::PageTable(int64_t num_pages, int64_t page_size) : page_size_(page_size) {
  if (num_pages < 0 || num_pages > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("num_pages must be 0 to 2147483647, got " + text(num_pages));
  }
  if (page_size < 1 || page_size > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("page_size must be 1 to 2147483647, got " + text(page_size));
  }
  holders_.assign(num_pages, 0);
  free_.reserve(num_pages);
  // The lowest number first, so that used pages stay together.
  for (int64_t page = num_pages - 1; page >= 0; --page) free_.push_back(static_cast<int32_t>(page));
}

PageTable::PageTable(const State& state) : PageTable(std::get<0>(state), std::get<1>(state)) {
  const auto require = [](bool holds) {
    if (!holds) throw std::invalid_argument("state is not that of a page table");
  };
  next_ = std::get<4>(state);
  for (const auto& [name, length, pages] : std::get<3>(state)) {
    require(name >= 0 && name < next_ && length >= 0);
    require(static_cast<int64_t>(pages.size()) == pages_for(length));
    require(sequences_.emplace(name, Sequence{length, pages}).second);
    for (int32_t page : pages) {
      require(page >= 0 && page < num_pages());
      ++holders_[page];
    }
  }
  free_ = std::get<2>(state);
  std::unordered_set<int32_t> unheld;
  for (int32_t page : free_) {
    require(page >= 0 && page < num_pages() && holders_[page] == 0 && unheld.insert(page).second);
  }
  require(std::count(holders_.begin(), holders_.end(), 0) == free_pages());
}

PageTable::State PageTable::state() const {
  std::vector<std::tuple<SequenceId, int64_t, std::vector<int32_t>>> held;
  for (const auto& [name, sequence] : sequences_) held.emplace_back(name, sequence.length, sequence.pages);
  std::sort(held.begin(), held.end());
  return {num_pages(), page_size_, free_, std::move(held), next_};
}

const PageTable::Sequence& PageTable::find(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  if (found != sequences_.end()) return found->second;
  const bool was_there = sequence >= 0 && sequence < next_;
  throw std::invalid_argument("sequence " + text(sequence) + (was_there ? " was freed" : " does not exist"));
}

void PageTable::check(const std::vector<SequenceId>& sequences) const {
  std::unordered_set<SequenceId> seen;
  seen.reserve(sequences.size());
  for (SequenceId sequence : sequences) {
    if (!seen.insert(sequence).second) {
      throw std::invalid_argument("sequence " + text(sequence) + " is named twice");
    }
  }
  for (SequenceId sequence : sequences) find(sequence);
}

int32_t PageTable::take_page() {
  const int32_t page = free_.back();
  free_.pop_back();
  holders_[page] = 1;
  return page;
}

void PageTable::release_page(int32_t page) {
  if (--holders_[page] == 0) free_.push_back(page);
}

std::vector<SequenceId> PageTable::create(int64_t count) {
  if (count < 0) throw std::invalid_argument("count must be 0 or more, got " + text(count));
  std::vector<SequenceId> created;
  created.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    created.push_back(next_);
    sequences_.emplace(next_++, Sequence{});
  }
  return created;
}

int64_t PageTable::pages_wanted(const std::vector<SequenceId>& sequences, int64_t tokens) const {
  int64_t wanted = 0;
  // Each copy of a shared last page leaves it with one holder fewer: the last one writes in place.
  std::unordered_map<int32_t, int32_t> copies;
  for (SequenceId sequence : sequences) {
    const Sequence& s = find(sequence);
    wanted += pages_for(s.length + tokens) - static_cast<int64_t>(s.pages.size());
    if (!writes_into_last_page(s, tokens) || holders_[s.pages.back()] == 1) continue;
    int32_t& copied = copies[s.pages.back()];
    if (holders_[s.pages.back()] - copied > 1) ++copied, ++wanted;
  }
  return wanted;
}

std::vector<PageCopy> PageTable::append(const std::vector<SequenceId>& sequences, int64_t tokens) {
  if (tokens < 0 || tokens > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("tokens must be 0 to 2147483647, got " + text(tokens));
  }
  check(sequences);
  const int64_t wanted = pages_wanted(sequences, tokens);
  if (wanted > free_pages()) {
    throw std::runtime_error("out of pages: " + text(wanted) + " are needed, " + text(free_pages()) + " of " +
                             text(num_pages()) + " are free");
  }
  std::vector<PageCopy> copies;
  for (SequenceId sequence : sequences) {
    Sequence& s = find(sequence);
    if (writes_into_last_page(s, tokens) && holders_[s.pages.back()] > 1) {
      const int32_t own = take_page();
      copies.emplace_back(s.pages.back(), own);
      release_page(s.pages.back());
      s.pages.back() = own;
    }
    s.length += tokens;
    for (int64_t have = s.pages.size(); have < pages_for(s.length); ++have) s.pages.push_back(take_page());
  }
  return copies;
}

SequenceId PageTable::fork(SequenceId sequence) {
  Sequence twin = find(sequence);
  for (int32_t page : twin.pages) ++holders_[page];
  sequences_.emplace(next_, std::move(twin));
  return next_++;
}

void PageTable::crop(const std::vector<SequenceId>& sequences, const std::vector<int64_t>& lengths) {
  if (sequences.size() != lengths.size()) {
    throw std::invalid_argument("lengths must be one for each of " + text(sequences.size()) +
                                " sequences, got " + text(lengths.size()));
  }
  check(sequences);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const int64_t length = find(sequences[i]).length;
    if (lengths[i] < 0 || lengths[i] > length) {
      throw std::invalid_argument("sequence " + text(sequences[i]) + " has " + text(length) +
                                  " tokens and cannot be cropped to " + text(lengths[i]));
    }
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& s = find(sequences[i]);
    s.length = lengths[i];
    while (static_cast<int64_t>(s.pages.size()) > pages_for(s.length)) {
      release_page(s.pages.back());
      s.pages.pop_back();
    }
  }
}

void PageTable::free(const std::vector<SequenceId>& sequences) {
  check(sequences);
  for (SequenceId sequence : sequences) {
    for (int32_t page : find(sequence).pages) release_page(page);
    sequences_.erase(sequence);
  }
}

std::vector<SequenceId> PageTable::reorder(const std::vector<SequenceId>& sequences,
                                           const std::vector<int64_t>& picks) {
  check(sequences);
  const auto count = static_cast<int64_t>(sequences.size());
  for (int64_t pick : picks) {
    if (pick < 0 || pick >= count) {
      throw std::invalid_argument("picks must be 0 to " + text(count - 1) + ", got " + text(pick));
    }
  }
  std::vector<bool> picked(count, false);
  std::vector<SequenceId> result;
  result.reserve(picks.size());
  for (int64_t pick : picks) {
    result.push_back(picked[pick] ? fork(sequences[pick]) : sequences[pick]);
    picked[pick] = true;
  }
  std::vector<SequenceId> rest;
  for (int64_t i = 0; i < count; ++i) {
    if (!picked[i]) rest.push_back(sequences[i]);
  }
  free(rest);
  return result;
}

void PageTable::block_table(const std::vector<SequenceId>& sequences, int64_t width, int32_t* rows) const {
  for (SequenceId sequence : sequences) {
    const std::vector<int32_t>& held = pages(sequence);
    const auto count = std::min<int64_t>(width, held.size());
    std::copy_n(held.begin(), count, rows);
    std::fill(rows + count, rows + width, 0);
    rows += width;
  }
}

}  // namespace resformer
