//! The report as a table that a person can read.

use crate::{
    bench::report::{Hop, Report, Sweep},
    policy::format_size,
    units::ByteCount,
};

const HEADERS: [&str; 12] = [
    "hop",
    "where",
    "GB/s",
    "GiB/s",
    "spread",
    "p50",
    "p99",
    "block",
    "depth",
    "engine",
    "direct",
    "of its limit, and more",
];

/// Everything, for a terminal. Rates are medians; GB is 1e9 bytes.
pub fn text(report: &Report) -> String {
    let mut out = format!("{}\n{}\n\n", report.machine.describe(), report.date);
    let mut rows: Vec<Vec<String>> = vec![HEADERS.map(str::to_owned).into()];
    rows.extend(report.hops.iter().filter(|hop| hop.figure.is_some()).map(row));
    out += &aligned(&rows, 2);
    for hop in report.hops.iter().filter(|hop| hop.skipped.is_some()) {
        out += &format!("{} {}: {}\n", hop.name, hop.place, hop.skipped.as_deref().unwrap_or_default());
    }
    out += "\nhost_memory counts what certainly moves: 24 bytes per fp64 element of the triad, as STREAM does, 26 per bf16 \
            parameter in place;\nadamw_cpu 26, adamw_nvme 20, train_traffic 26 over links and disks; device_memory reads and \
            writes together.\np50 and p99 are of one block or piece.\n";
    for sweep in &report.sweeps {
        out += &format!("\n{}\n{}", title(sweep), aligned(&matrix(sweep), 1));
    }
    let commands: Vec<&str> = report.hops.iter().filter_map(|hop| hop.fio.as_deref()).collect();
    if !commands.is_empty() {
        out +=
            "\nThe same with fio (on virtual disks with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as our buffers are):\n";
        out += &commands.iter().map(|command| format!("  {command}\n")).collect::<String>();
    }
    for note in &report.notes {
        out += &format!("\n{note}\n");
    }
    out.push('\n');
    for sentence in &report.verdict {
        out += &format!("{sentence}\n");
    }
    out
}

fn row(hop: &Hop) -> Vec<String> {
    let figure = hop.figure.as_ref();
    let of = |f: fn(&super::report::Figure) -> String| figure.map_or_else(String::new, f);
    let size = |bytes: Option<u64>| bytes.map_or_else(String::new, |bytes| ByteCount(bytes).to_string());
    vec![
        hop.name.clone(),
        hop.place.clone(),
        of(|f| format!("{:.2}", f.bytes_per_second / 1e9)),
        of(|f| format!("{:.2}", f.bytes_per_second / f64::from(1 << 30))),
        of(|f| format!("{:.0} %", f.spread * 100.0)),
        of(|f| micros(f.p50_us)),
        of(|f| micros(f.p99_us)),
        size(hop.block),
        hop.depth.map_or_else(String::new, |depth| depth.to_string()),
        hop.engine.clone().unwrap_or_default(),
        hop.direct.map_or_else(String::new, |direct| if direct { "yes" } else { "no" }.to_owned()),
        remarks(hop),
    ]
}

/// What else there is to say: the part of the limit that was reached, parameters, copies beside it, fio.
pub(super) fn remarks(hop: &Hop) -> String {
    let limit = hop.limit.as_ref().map(|limit| format!("{:.2} of {}", limit.fraction, limit.by));
    let fio = match &hop.limit {
        Some(limit) if limit.by == "fio" => None,
        _ => hop.fio_bytes_per_second.map(|fio| format!("fio {:.2} GB/s", fio / 1e9)),
    };
    let figure = hop.figure.as_ref();
    let params = figure.and_then(|f| f.params_per_second).map(|params| format!("{:.3} Gparam/s", params / 1e9));
    let copies = figure.and_then(|f| f.copied_per_second).map(|copies| format!("copies {:.2} GB/s", copies / 1e9));
    [limit, params, copies, fio].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// `87 us`, `3.4 ms`.
pub(super) fn micros(us: f64) -> String {
    if us < 1000.0 { format!("{us:.0} us") } else { format!("{:.1} ms", us / 1000.0) }
}

/// What a sweep shows.
pub(super) fn title(sweep: &Sweep) -> String {
    match (sweep.over, sweep.name.as_str()) {
        ("threads", _) => "host memory and AdamW on the processor, GB/s by threads".to_owned(),
        (_, "link") => "copies between host and device, GB/s by block".to_owned(),
        (_, name) => format!("{name}, GB/s by block and depth"),
    }
}

/// A value of a sweep's x.
pub(super) fn tick(sweep: &Sweep, x: u64) -> String {
    if sweep.over == "threads" { x.to_string() } else { format_size(ByteCount(x)) }
}

fn matrix(sweep: &Sweep) -> Vec<Vec<String>> {
    let mut xs: Vec<u64> = sweep.series.iter().flat_map(|s| s.points.iter().map(|p| p.0)).collect();
    xs.sort_unstable();
    xs.dedup();
    let mut rows = vec![std::iter::once(String::new()).chain(xs.iter().map(|&x| tick(sweep, x))).collect::<Vec<_>>()];
    for series in &sweep.series {
        let at =
            |x: &u64| series.points.iter().find(|p| p.0 == *x).map_or("-".to_owned(), |p| format!("{:.2}", p.1 / 1e9));
        rows.push(std::iter::once(series.label.clone()).chain(xs.iter().map(at)).collect());
    }
    rows
}

/// Columns of equal width; the first `left` of them begin left, the others end right.
fn aligned(rows: &[Vec<String>], left: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |n: usize| rows.iter().filter_map(|row| row.get(n)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(n, (cell, &width))| {
            if n < left || n + 1 == HEADERS.len() { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{report::Series, verdict::tests::hop};

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["bcd".to_owned(), "1234".to_owned()]];
        assert_eq!(aligned(&rows, 1), "a       1\nbcd  1234\n");
    }

    #[test]
    fn a_row_has_a_cell_for_every_header_and_both_units() {
        let row = row(&hop("nvme_read", 2.0 * 1024.0 * 1024.0 * 1024.0));
        assert_eq!(row.len(), HEADERS.len());
        assert_eq!((row[2].as_str(), row[3].as_str(), row[7].as_str()), ("2.15", "2.00", "1.0 MiB"));
        assert_eq!((micros(12.4), micros(3456.0)), ("12 us".to_owned(), "3.5 ms".to_owned()));
    }

    #[test]
    fn a_sweep_with_gaps_keeps_its_columns() {
        let series = |label: &str, points: &[(u64, f64)]| Series { label: label.to_owned(), points: points.into() };
        let series = vec![series("depth 1", &[(4096, 1e9), (8192, 2e9)]), series("depth 2", &[(4096, 3e9)])];
        let rows = matrix(&Sweep { name: "nvme_read".to_owned(), over: "block", series });
        assert_eq!(rows, [["", "4KiB", "8KiB"], ["depth 1", "1.00", "2.00"], ["depth 2", "3.00", "-"]]);
    }
}
