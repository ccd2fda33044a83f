#include "column_order.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace dropinf {
namespace {

constexpr int64_t kAtOnce = 8;       // lanes that read 16 bytes each: all banks
constexpr int64_t kCandidates = 16;  // columns that a lane's is chosen of; more are no better

// A column of x: its coordinates by the banks of their cells of dy, and how many pieces it has.
struct Column {
  int32_t x_cell;
  int64_t size = 0;
  std::array<std::vector<int32_t>, kAtOnce> of_bank;
  int64_t num_long = 0, num_short = 0;

  int32_t take(int bank) {
    const int32_t e = of_bank[bank].back();
    of_bank[bank].pop_back();
    --size;
    return e;
  }
};

std::vector<Column> columns_of(const int32_t* x_cell, const int32_t* dy_cell, int64_t n) {
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return x_cell[a] < x_cell[b]; });
  std::vector<Column> columns;
  for (const int32_t e : order) {
    if (columns.empty() || columns.back().x_cell != x_cell[e]) columns.push_back({x_cell[e]});
    columns.back().of_bank[dy_cell[e] % kAtOnce].push_back(e);
    ++columns.back().size;
  }
  return columns;
}

// Long pieces for what fills them, short ones for the rest; if those run out, long ones for that
// too, first where one takes the place of two. Whether there are enough.
bool cut_pieces(std::vector<Column>& columns) {
  int64_t long_left = kLongPieces * kColumnLanes, short_left = kShortPieces * kColumnLanes;
  for (Column& column : columns) {
    column.num_long = std::min(column.size / kLongSteps, long_left);
    const int64_t rest = column.size - column.num_long * kLongSteps;
    column.num_short = (rest + kShortSteps - 1) / kShortSteps;
    long_left -= column.num_long;
    short_left -= column.num_short;
  }
  for (const int64_t replaced : {2, 1}) {
    for (Column& column : columns) {
      while (short_left < 0 && long_left > 0 && column.num_short >= replaced) {
        ++column.num_long;
        column.num_short -= replaced;
        short_left += replaced;
        --long_left;
      }
    }
  }
  return short_left >= 0;
}

// The columns of eight lanes; null for a lane without a piece.
using Group = std::array<Column*, kAtOnce>;
using Queues = std::array<std::vector<Column*>, kAtOnce>;

// Each lane's column is one of the last in the queue of its bank of x, or in the longest where that
// is empty: the one whose coordinates, for these steps, crowd the banks of dy least.
Group next_group(Queues& queues, int64_t steps) {
  Group group{};
  std::array<double, kAtOnce> load{};  // coordinates of each bank that the steps will read
  for (int lane = 0; lane < kAtOnce; ++lane) {
    auto* queue = &queues[lane];
    if (queue->empty()) {
      queue = &*std::max_element(queues.begin(), queues.end(),
                                 [](const auto& a, const auto& b) { return a.size() < b.size(); });
    }
    if (queue->empty()) break;
    const double even = static_cast<double>(steps) * (lane + 1) / kAtOnce;
    const auto with = [&](const Column& column) {
      const double share =
          std::min(1.0, static_cast<double>(steps) / std::max<int64_t>(1, column.size));
      std::array<double, kAtOnce> sum = load;
      for (int bank = 0; bank < kAtOnce; ++bank) sum[bank] += share * column.of_bank[bank].size();
      return sum;
    };
    auto best = queue->end();
    double lowest = 0;
    const auto candidates = std::min<int64_t>(queue->size(), kCandidates);
    for (auto it = queue->end() - candidates; it != queue->end(); ++it) {
      double cost = 0;
      for (const double sum : with(**it)) cost += sum > even ? (sum - even) * (sum - even) : 0;
      if (best == queue->end() || cost < lowest) {
        best = it;
        lowest = cost;
      }
    }
    group[lane] = *best;
    load = with(**best);
    queue->erase(best);
  }
  return group;
}

// The banks that the lanes of a group read in a step, all different where that can be: a matching,
// by augmenting paths, the lanes with the fewest banks to choose from first.
class Matching {
 public:
  explicit Matching(const Group& group) : group_(group) {
    lane_of_.fill(-1);
    std::array<int, kAtOnce> lanes, choices{};
    std::iota(lanes.begin(), lanes.end(), 0);
    for (const int lane : lanes) {
      if (!group[lane]) continue;
      for (const auto& coordinates : group[lane]->of_bank) choices[lane] += !coordinates.empty();
    }
    std::stable_sort(lanes.begin(), lanes.end(),
                     [&](int a, int b) { return choices[a] < choices[b]; });
    for (const int lane : lanes) {
      std::array<bool, kAtOnce> seen{};
      if (choices[lane]) find(lane, seen);
    }
  }

  // -1 for a lane that is in none.
  int bank_of(int lane) const {
    for (int bank = 0; bank < kAtOnce; ++bank) {
      if (lane_of_[bank] == lane) return bank;
    }
    return -1;
  }

 private:
  // Banks of which the column has most, first, so that it keeps a choice.
  bool find(int lane, std::array<bool, kAtOnce>& seen) {
    const auto& of_bank = group_[lane]->of_bank;
    std::array<int, kAtOnce> banks;
    std::iota(banks.begin(), banks.end(), 0);
    std::stable_sort(banks.begin(), banks.end(),
                     [&](int a, int b) { return of_bank[a].size() > of_bank[b].size(); });
    for (const int bank : banks) {
      if (of_bank[bank].empty() || seen[bank]) continue;
      seen[bank] = true;
      if (lane_of_[bank] < 0 || find(lane_of_[bank], seen)) {
        lane_of_[bank] = lane;
        return true;
      }
    }
    return false;
  }

  const Group& group_;
  std::array<int, kAtOnce> lane_of_;
};

// One step of eight lanes: a coordinate of each column that has one left. A lane without one reads
// what another reads, which costs nothing.
void take_step(const Group& group, int32_t* coordinate) {
  const Matching matching(group);
  int32_t repeated = 0;
  std::array<bool, kAtOnce> done{};
  for (int lane = 0; lane < kAtOnce; ++lane) {
    Column* const column = group[lane];
    if (!column || !column->size) continue;
    int bank = matching.bank_of(lane);
    // Two lanes of one column may have been matched to its last coordinate, or a lane to none.
    if (bank < 0 || column->of_bank[bank].empty()) {
      const auto& of_bank = column->of_bank;
      bank = static_cast<int>(
          std::max_element(of_bank.begin(), of_bank.end(),
                           [](const auto& a, const auto& b) { return a.size() < b.size(); }) -
          of_bank.begin());
    }
    coordinate[lane] = repeated = column->take(bank);
    done[lane] = true;
  }
  for (int lane = 0; lane < kAtOnce; ++lane) {
    if (!done[lane]) coordinate[lane] = ~repeated;
  }
}

void place(PassOrder& order, std::vector<Column>& columns, int64_t Column::* count,
           int64_t first_piece, int64_t first_step, int64_t steps) {
  Queues queues;
  for (Column& column : columns) {
    for (int64_t n = 0; n < column.*count; ++n) {
      queues[column.x_cell % kAtOnce].push_back(&column);
    }
  }
  for (int64_t lane = 0;; lane += kAtOnce) {
    const Group group = next_group(queues, steps);
    if (!group[0]) return;
    const int64_t piece = lane / kColumnLanes, at = lane % kColumnLanes;
    order.pieces |= int64_t{1} << (first_piece + piece);
    for (int n = 0; n < kAtOnce; ++n) {
      order.x_cell[(first_piece + piece) * kColumnLanes + at + n] =
          (group[n] ? group[n] : group[0])->x_cell;
    }
    for (int64_t step = 0; step < steps; ++step) {
      take_step(group, &order.coordinate[(first_step + piece * steps + step) * kColumnLanes + at]);
    }
  }
}

}  // namespace

PassOrder order_columns(const int32_t* x_cell, const int32_t* dy_cell, int64_t n) {
  PassOrder order;
  std::vector<Column> columns = columns_of(x_cell, dy_cell, n);
  if (!cut_pieces(columns)) return order;
  order.coordinate.assign(kLaneSteps * kColumnLanes, ~0);
  order.x_cell.assign(kLanePieces * kColumnLanes, x_cell[0]);
  place(order, columns, &Column::num_long, 0, 0, kLongSteps);
  place(order, columns, &Column::num_short, kLongPieces, kLongPieces * kLongSteps, kShortSteps);
  return order;
}

}  // namespace dropinf
