//! The tabcast binary: arguments, logging and the start; no decisions.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::ArgMatches;
use clap::Parser;
use clap::{Arg, ArgAction, Command};
use tabcast::bench;
use tabcast::config::ConfigError;
use tabcast::config::Machine;
use tabcast::config::ReferenceForm;
use tabcast::config::Settings;
use tabcast::config::Sources;
use tabcast::gateway::auth::Keys;
use tabcast::gateway::certificate_files::CertificateFiles;
use tabcast::gateway::deploy::DeployFile;
use tabcast::gateway::reload::Reload;
use tabcast::gateway::serve;
use tabcast::logs;
use tabcast::logs::Logs;
use tabcast::terminal::Tail;
use tabcast::terminal::Top;

// A sanitizer watches the heap by an allocator of its own.
#[cfg(not(tabcast_sanitizer))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The settings are not usable (also clap's code for bad arguments).
const BAD_CONFIG: u8 = 2;

fn command() -> Command {
    let mut command = Command::new("tabcast")
        .version(env!("CARGO_PKG_VERSION"))
        .about(env!("CARGO_PKG_DESCRIPTION"))
        .after_help(
            "Every setting is also a key of the file (tabs_max) and a variable (TABCAST_TABS_MAX).\n\
             A flag wins over the variable, the variable over the file.",
        )
        .subcommand(Command::new("serve").about("Run the gateway (also without a subcommand)"))
        .subcommand(client_entry("top", "Show a node as it is, in a terminal"))
        .subcommand(client_entry("tail", "Print the frames of a channel as they go by"))
        .subcommand(client_entry("bench", "Measure a fan-out server"))
        .subcommand(Command::new("check-config").about("Check the settings and print them, secrets masked"))
        .subcommand(
            Command::new("config-reference")
                .about("Print what every setting is: spellings, unit, default, memory, whether SIGHUP changes it")
                .arg(
                    Arg::new("format")
                        .long("format")
                        .value_parser(["markdown", "toml"])
                        .default_value("markdown")
                        .help("toml: a file with every default"),
                ),
        )
        .subcommand(print_entry())
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .value_parser(clap::value_parser!(std::path::PathBuf))
                .help("A TOML file of settings [variable: TABCAST_CONFIG]")
                .global(true),
        );
    for setting in Settings::ALL {
        let action = if setting.is_list { ArgAction::Append } else { ArgAction::Set };
        let arg = Arg::new(setting.name).long(setting.flag).value_name("VALUE").help(setting.help.trim());
        let snake_case = (setting.flag != setting.name).then_some(setting.name);
        command = command.arg(arg.aliases(snake_case).action(action).global(true));
    }
    command
}

/// `tabcast print NAME`: what runs and watches a gateway elsewhere.
fn print_entry() -> Command {
    let names = DeployFile::ALL.map(DeployFile::name);
    let file = Arg::new("file").value_name("FILE").required(true).value_parser(names).help("Which one");
    Command::new("print")
        .about("Print a Grafana dashboard, Prometheus alerts, a systemd unit or a Dockerfile")
        .arg(file)
}

/// The place of a client in the list of subcommands. Its arguments are its own, as a gateway's settings mean nothing to it:
/// [`client`] parses them apart.
fn client_entry(name: &'static str, about: &str) -> Command {
    Command::new(name).about(format!("{about}: see `tabcast {name} --help`")).disable_help_flag(true)
}

/// Runs what is no gateway, if the first argument names it.
fn client(mut arguments: impl Iterator<Item = OsString>) -> Option<u8> {
    let name = arguments.next()?;
    let name = name.to_str()?;
    let arguments = std::iter::once(OsString::from(format!("tabcast {name}"))).chain(arguments);
    match name {
        "bench" => Some(bench::main(&bench::Arguments::parse_from(arguments))),
        "top" => Some(Top::parse_from(arguments).run()),
        "tail" => Some(Tail::parse_from(arguments).run()),
        _ => None,
    }
}

/// The settings from the file, the environment and the flags, in this order of weight.
fn load(matches: &ArgMatches, variables: Vec<(OsString, OsString)>) -> Result<Settings, ConfigError> {
    let mut sources = Sources::new();
    let from_variable = variables.iter().find(|(name, _)| name == "TABCAST_CONFIG").map(|(_, value)| value.as_ref());
    let file = matches.get_one::<std::path::PathBuf>("config").map(std::path::PathBuf::as_path).or(from_variable);
    if let Some(path) = file.filter(|path: &&Path| !path.as_os_str().is_empty()) {
        sources = sources.with_file(path)?;
    }
    sources = sources.with_variables(variables);
    for setting in Settings::ALL {
        if let Some(values) = matches.get_many::<String>(setting.name) {
            sources = sources.with_flag(setting.name, values.cloned().collect());
        }
    }
    sources.load(Machine::here())
}

/// `bytes` for people, with three digits that count.
fn binary_size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let steps = (bytes.max(1).ilog2() / 10).min(4);
    let whole = bytes >> (10 * steps);
    let tenths = ((u128::from(bytes) * 10) >> (10 * steps)) % 10;
    let unit = units[steps as usize];
    if whole >= 100 || steps == 0 { format!("{whole} {unit}") } else { format!("{whole}.{tenths} {unit}") }
}

fn announce(settings: &Settings) {
    let page = settings.public_url.clone().unwrap_or_else(|| match settings.listen.port() {
        0 => format!("on a free port of {}", settings.listen.ip()),
        _ => format!("{}://{}/", settings.scheme(), settings.listen),
    });
    let mode = if settings.is_development() { "development" } else { "keys" };
    tracing::info!(
        %page, mode, tabs_max = settings.tabs_max, shards = settings.shards,
        file_tables = settings.file_tables.as_str(), worker = settings.worker.as_str(), "tabcast starts"
    );
    for warning in settings.warnings() {
        if tracing::enabled!(tracing::Level::WARN) {
            tracing::warn!("{warning}");
        } else {
            // Whoever silences the log still has to know that every route is open.
            let _ = writeln!(std::io::stderr(), "tabcast: {warning}");
        }
    }
    let terms = settings.memory_worst_case();
    let sum: u64 = terms.iter().map(|(_, bytes)| bytes).sum();
    tracing::info!("memory at the worst: {} is the sum of", binary_size(sum));
    for (term, bytes) in terms {
        tracing::info!("  {:>9} {term}", binary_size(bytes));
    }
}

/// The file and what `file:` names are read anew; flags and variables stay what they were.
fn reload(matches: ArgMatches, variables: Vec<(OsString, OsString)>, logs: Logs) -> Reload {
    let read = move || {
        let settings = load(&matches, variables.clone()).map_err(|error| error.to_string())?;
        logs::rules(&settings.log)?;
        Ok(settings)
    };
    Reload::new(read).with_log(move |rules| logs.replace(rules))
}

fn print(text: &str) -> Result<ExitCode, Box<dyn std::error::Error>> {
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn refuse(error: &dyn std::fmt::Display) -> ExitCode {
    // Where standard error is gone, the exit code still tells.
    let _ = writeln!(std::io::stderr(), "tabcast: {error}");
    ExitCode::from(BAD_CONFIG)
}

fn run(matches: &ArgMatches) -> Result<ExitCode, Box<dyn std::error::Error>> {
    if let Some(name @ ("bench" | "top" | "tail")) = matches.subcommand_name() {
        return Err(format!("{name} comes first, and takes no settings: tabcast {name} --help").into());
    }
    if let Some(("config-reference", wanted)) = matches.subcommand() {
        let is_toml = wanted.get_one::<String>("format").is_some_and(|format| format == "toml");
        let form = if is_toml { ReferenceForm::Toml } else { ReferenceForm::Markdown };
        return print(&Settings::reference(form));
    }
    if let Some(("print", arguments)) = matches.subcommand() {
        let file = arguments.get_one::<String>("file").and_then(|name| DeployFile::named(name));
        return print(file.map_or("", DeployFile::text));
    }
    let variables: Vec<_> = std::env::vars_os().collect();
    let settings = load(matches, variables.clone())?;
    // A key that cannot verify, and a certificate that nobody would accept, are found before anything is opened.
    let _keys = Keys::new(&settings)?;
    let _certificates = CertificateFiles::open(&settings)?;
    if matches.subcommand_name() == Some("check-config") {
        logs::rules(&settings.log)?;
        let warnings = settings.warnings().into_iter().map(|warning| format!("# {warning}\n"));
        return print(&(settings.to_toml() + &warnings.collect::<String>()));
    }
    let logs = logs::start(&settings.log, settings.log_format)?;
    announce(&settings);
    // Many small sessions in sparse huge pages take half as much memory again. Refused, it only costs that.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    match serve::run_reloading(settings, None, Some(reload(matches.clone(), variables, logs))) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            tracing::error!("{error}");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn main() -> ExitCode {
    if let Some(code) = client(std::env::args_os().skip(1)) {
        return code.into();
    }
    run(&command().get_matches()).unwrap_or_else(|error| refuse(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Settings, ConfigError> {
        let arguments = std::iter::once("tabcast").chain(arguments.iter().copied());
        let matches = command().try_get_matches_from(arguments).unwrap();
        load(&matches, variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
    }

    #[test]
    fn the_arguments_are_well_formed() {
        command().debug_assert();
    }

    #[test]
    fn every_setting_is_a_flag_in_both_spellings_before_and_after_the_subcommand() {
        assert_eq!(settings(&["--rooms-max", "3"], &[]).unwrap().rooms_max, 3);
        assert_eq!(settings(&["--rooms_max=3", "serve"], &[]).unwrap().rooms_max, 3);
        assert_eq!(settings(&["serve", "--rooms-max", "3"], &[("TABCAST_ROOMS_MAX", "4")]).unwrap().rooms_max, 3);
        let lists = settings(&["--api-keys", "a,b", "--api-keys", "c", "check-config"], &[]).unwrap();
        assert_eq!(lists.api_keys.len(), 3);
    }

    #[test]
    fn an_unknown_flag_is_refused_with_the_nearest_one() {
        let refused = command().try_get_matches_from(["tabcast", "--lisen", "x"]).unwrap_err().to_string();
        assert!(refused.contains("--listen"), "{refused}");
    }

    #[test]
    fn the_file_is_named_by_a_flag_or_a_variable() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tabcast.toml");
        std::fs::write(&path, "rooms_max = 5").unwrap();
        let path = path.to_str().unwrap();
        assert_eq!(settings(&["--config", path], &[]).unwrap().rooms_max, 5);
        assert_eq!(settings(&[], &[("TABCAST_CONFIG", path)]).unwrap().rooms_max, 5);
        assert_eq!(settings(&[], &[("TABCAST_CONFIG", path), ("TABCAST_ROOMS_MAX", "6")]).unwrap().rooms_max, 6);
        assert!(matches!(settings(&["--config", "/nowhere"], &[]), Err(ConfigError::Unreadable { .. })));
    }

    #[test]
    fn sizes_are_readable() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (256 << 20, "256 MiB"),
            ((1 << 30) - 1, "1023 MiB"),
            (1 << 40, "1.0 TiB"),
        ] {
            assert_eq!(binary_size(bytes), expected);
        }
    }
}
